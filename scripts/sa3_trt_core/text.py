"""Encode prompts to text features; the tokenizer equals that of transformers, without that package."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.artifacts import files
from sa3_trt_core.engines.base import require_output
from sa3_trt_core.errors import ToolError, ToolWarning
from sa3_trt_core.shapes import TEXT_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine

MAX_CONFIG = 4 << 20  # bytes
QUOTED = 30  # letters of a prompt quoted on each side of the cut
_MEND = "get the folder's tokenizer files again"
_GEMMA_PAD = "<pad>"


class Tokenizer:
    """Tokenizer, equal to AutoTokenizer(padding="max_length", truncation=True, max_length=256) of the same folder.

    BOS and EOS are those of tokenizer.json's post-processor; add_bos_token of the config is ignored. Sides are those of
    tokenizer_config.json, else of tokenizer.json, else of the tokenizer class (Gemma pads left).
    """

    def __init__(self, tokenizer_json: Path, length: int = TEXT_TOKENS) -> None:
        """`tokenizer_json` has tokenizer_config.json beside it. Raises ToolError."""
        import tokenizers

        config = _read_config(tokenizer_json.with_name("tokenizer_config.json"))
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_json))
        except Exception as error:  # the library raises a bare Exception
            raise ToolError(f"cannot read {tokenizer_json}: {error}", _MEND) from None
        pad_token = _pad_token(config)
        pad_id = self._tokenizer.token_to_id(pad_token) if pad_token else None
        if pad_token is None or pad_id is None:
            raise ToolError(f"{tokenizer_json.parent} has no pad token", _MEND)
        padding, truncation = self._tokenizer.padding or {}, self._tokenizer.truncation or {}
        by_class = "left" if _is_gemma(config) else "right"
        side = _side(config, "padding_side", padding.get("direction", by_class))
        cut = _side(config, "truncation_side", truncation.get("direction", "right"))
        self._tokenizer.enable_truncation(length, direction=cut)
        self._tokenizer.enable_padding(direction=side, pad_id=pad_id, pad_token=pad_token, length=length)

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (input_ids, attention_mask), both int64 (B, 256). An empty prompt is allowed.

        A longer prompt is truncated, with a ToolWarning that quotes the position.
        """
        import torch

        rows = self._tokenizer.encode_batch(list(prompts))
        for prompt, row in zip(prompts, rows, strict=True):
            _warn_if_cut(prompt, row)
        ids = torch.tensor([row.ids for row in rows], dtype=torch.int64)
        mask = torch.tensor([row.attention_mask for row in rows], dtype=torch.int64)
        return ids, mask


def _warn_if_cut(prompt: str, row: Any) -> None:
    """Issue a ToolWarning for a truncated prompt; `row` is its encoding."""
    if not row.overflowing:
        return
    # Special tokens and padding have empty offsets.
    spans = [span for span, real in zip(row.offsets, row.attention_mask, strict=True) if real and span[0] < span[1]]
    first, last = (min(start for start, _ in spans), max(end for _, end in spans)) if spans else (0, 0)
    if not prompt[:first].strip() and not prompt[last:].strip():
        return  # only special tokens or blanks were cut
    if prompt[last:].strip():
        where = f"nothing is read after {prompt[max(0, last - QUOTED) : last]!r}, so not {prompt[last:][:QUOTED]!r}"
    else:
        where = f"nothing is read before {prompt[first:][:QUOTED]!r}"
    tokens = sum(row.attention_mask)
    warnings.warn(f"a prompt is longer than {tokens} tokens: {where}", ToolWarning, stacklevel=3)


def encode_text(engine: GraphEngine, tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return (t5_hidden (B, 256, 768), t5_mask (B, 256)), both fp32, for the DiT."""
    ids, mask = tokenizer.encode(prompts)
    hidden = require_output(engine.run({"input_ids": ids, "attention_mask": mask}), "hidden_states")
    return hidden.float(), mask.float()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(files.read_text(path, MAX_CONFIG))
    except ToolError as error:
        raise ToolError(error.message, _MEND) from None
    except (ValueError, RecursionError) as error:
        raise ToolError(f"cannot read {path}: {error}", _MEND) from None
    if not isinstance(config, dict):
        raise ToolError(f"{path} is not a JSON object", _MEND)
    return config


def _is_gemma(config: dict[str, Any]) -> bool:
    return str(config.get("tokenizer_class", "")).startswith("Gemma")


def _pad_token(config: dict[str, Any]) -> str | None:
    """Return the pad token: a string, or in older files an object with "content"; Gemma has a default."""
    value = config.get("pad_token")
    if isinstance(value, dict):
        value = value.get("content")
    if value is None and _is_gemma(config):
        return _GEMMA_PAD
    return value if isinstance(value, str) else None


def _side(config: dict[str, Any], key: str, default: str) -> str:
    side = config.get(key, default)
    if side not in ("left", "right"):
        raise ToolError(f"tokenizer_config.json: {key} is {side!r}, not left or right", _MEND)
    return str(side)
