"""Load the text encoder and the tokenizer of a native checkpoint, offline."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sa3_trt_core.errors import ToolError


def load_text_encoder(folder: Path) -> nn.Module:
    """Return the encoder of the T5Gemma in `folder`, fp32, eager attention, without network access.

    bf16 features would have an error of 0.04. Raises ToolError when the folder is missing, is not a T5Gemma, or lacks a
    tensor.
    """
    from transformers import T5GemmaConfig, T5GemmaEncoderModel

    if not (folder / "config.json").is_file():
        raise ToolError(f"no text encoder in {folder}", "use a complete checkpoint: its text encoder is in that folder")
    try:
        config = T5GemmaConfig.from_pretrained(folder, local_files_only=True)
        config.is_encoder_decoder = False
        config.encoder._attn_implementation = "eager"
        with quiet_transformers():  # transformers reports the missing decoder, which is not needed here
            model, info = T5GemmaEncoderModel.from_pretrained(
                folder, config=config, dtype=torch.float32, attn_implementation="eager", local_files_only=True,
                use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise ToolError(
            f"{folder} does not contain a T5Gemma encoder ({error})", "download or export it again"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ToolError(f"{folder}: tensor {missing[0]} is missing", "download or make the text encoder again")
    encoder: nn.Module = model.eval().requires_grad_(False)
    return encoder


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in `folder`, without network access; its files determine padding side and BOS."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ToolError(f"no tokenizer in {folder} ({error})", "use a complete checkpoint") from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress progress bars, load reports and deprecation warnings of transformers inside the block."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(level)
