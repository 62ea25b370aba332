"""Sizes of a demo checkpoint, and its text part: a small T5Gemma and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sa3_build.export.text_encoder import quiet_transformers
from sa3_trt_core import shapes

SPECIAL_TOKENS: Mapping[str, str] = {
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
}


@dataclass(frozen=True)
class DemoSize:
    """Width and depth of a demo checkpoint; the contract fixes the other channel counts."""

    embed_dim: int = 256
    depth: int = 3
    num_heads: int = 4
    ff_mult: float = 4.0
    autoencoder_channels: int = 32
    autoencoder_depth: int = 3
    autoencoder_sinusoidal: int = 2
    text_layers: int = 2
    text_heads: int = 12
    text_hidden: int = 512


def text_config(size: DemoSize, vocabulary: int) -> Any:
    """Return the T5GemmaConfig of a demo size; its decoder is not used here and has one layer."""
    from transformers import T5GemmaConfig

    part = {
        "hidden_size": shapes.TEXT_CHANNELS,
        "intermediate_size": size.text_hidden,
        "num_attention_heads": size.text_heads,
        "num_key_value_heads": size.text_heads,
        "head_dim": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2 * shapes.TEXT_TOKENS,
    }
    return T5GemmaConfig(
        encoder={**part, "num_hidden_layers": size.text_layers},
        decoder={**part, "num_hidden_layers": 1, "cross_attention_hidden_size": shapes.TEXT_CHANNELS},
        vocab_size=vocabulary,
    )


def random_text_model(size: DemoSize, vocabulary: int) -> Any:
    """Return a T5Gemma (encoder and decoder) with random weights from torch's generator."""
    from transformers import T5GemmaForConditionalGeneration

    model = T5GemmaForConditionalGeneration(text_config(size, vocabulary))
    for key, tensor in model.state_dict().items():
        if "norm" in key:
            tensor.normal_(0.0, 0.1)  # Gemma's norms multiply by 1 + weight
        else:
            tensor.normal_(0.0, 0.5 if "embed" in key else tensor[0].numel() ** -0.5)
    return model


def write_text_model(folder: Path, model: Any) -> None:
    """Write a T5Gemma in bf16, in the layout of t5gemma-b-b-ul2."""
    with quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(folder)


def write_tokenizer(folder: Path, texts: Sequence[str], vocabulary: int, alphabet: Sequence[str] | None = None) -> int:
    """Train a byte-level BPE of at most `vocabulary` tokens, write its files and return its number of tokens.

    `alphabet` replaces the 256 bytes: other bytes become the unknown token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special.values()), show_progress=False,
        initial_alphabet=list(alphabet or pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    bos = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    save_tokenizer(folder, tokenizer)
    return int(tokenizer.get_vocab_size())


def save_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write a `tokenizers.Tokenizer` into a new folder in transformers' format: right padding, 256 tokens."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", model_max_length=shapes.TEXT_TOKENS, **SPECIAL_TOKENS
    ).save_pretrained(folder)
