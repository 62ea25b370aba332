"""Our tokenizer compared with transformers' AutoTokenizer of the same folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from sa3_trt_core.engines.base import DeviceEngine
from sa3_trt_core.errors import ToolError
from sa3_trt_core.text import Tokenizer, encode_text

PROMPTS = ["", " ", "Genre: House. Tempo: 120 BPM.", "Größe 音楽 🎵", "drum " * 400, "<bos> a <pad> b", "a\n\tb"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def make_folder(folder: Path, template: str, config: dict[str, object], padding: str | None = None) -> Path:
    """Write a byte-level BPE tokenizer of a few hundred tokens in the two files of the contract."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["a house track with drums and bass at 120 BPM"] * 3, trainer)
    ids = [(token, backend.token_to_id(token)) for token in SPECIAL if token in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    if padding is not None:
        backend.enable_padding(direction=padding, pad_id=0, pad_token="<pad>", length=8)
    backend.save(str(folder / "tokenizer.json"))
    base = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    whole = {"tokenizer_class": "PreTrainedTokenizerFast", **base, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(whole))
    return folder


CASES = [
    ("<bos> $A", {}, None),
    ("<bos> $A <eos>", {"padding_side": "left"}, None),
    ("$A <eos>", {"truncation_side": "left", "padding_side": "right"}, None),
    ("$A", {"pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True}}, None),
    ("$A", {}, "left"),
    ("$A", {"padding_side": "right"}, "left"),
    ("$A", {"add_bos_token": True, "add_eos_token": True}, None),
    ("<bos> $A <eos>", {"add_bos_token": True}, None),
    ("<bos> $A", {"add_bos_token": False}, None),
]


@pytest.mark.parametrize(("template", "config", "padding"), CASES)
def test_ids_and_mask_equal_transformers(
    tmp_path: Path, template: str, config: dict[str, object], padding: str | None
) -> None:
    folder = make_folder(tmp_path, template, config, padding)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    expected = reference(PROMPTS, padding="max_length", truncation=True, max_length=256, return_tensors="pt")
    ids, mask = Tokenizer(folder / "tokenizer.json").encode(PROMPTS)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.shape == mask.shape == (len(PROMPTS), 256)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])
    assert mask[4].sum() == 256  # the long prompt is cut, not refused


def test_a_gemma_folder_without_sides_pads_left(tmp_path: Path) -> None:
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, "a", "b", "▁"])}, merges=[]))
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    reference = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    expected = reference(["ab"], padding="max_length", truncation=True, max_length=256, return_tensors="pt")
    ids, mask = Tokenizer(tmp_path / "tokenizer.json").encode(["ab"])
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])
    assert ids[0, -3:].tolist() == [2, 4, 5]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{}"),
        ("tokenizer_config.json", '{"pad_token": "<absent>"}'),
        ("tokenizer_config.json", '{"pad_token": "<pad>", "padding_side": "up"}'),
    ],
)
def test_broken_tokenizer_files_are_two_lines(tmp_path: Path, file: str, text: str | None) -> None:
    folder = make_folder(tmp_path, "<bos> $A", {})
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(ToolError):
        Tokenizer(folder / "tokenizer.json")


def test_features_come_out_as_the_dit_takes_them(tmp_path: Path) -> None:
    class Encoder(DeviceEngine):
        input_names: tuple[str, ...] = ("input_ids", "attention_mask")

        def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"hidden_states": inputs["input_ids"].double()[..., None].expand(-1, -1, 768)}

    tokenizer = Tokenizer(make_folder(tmp_path, "<bos> $A", {}) / "tokenizer.json")
    hidden, mask = encode_text(Encoder(), tokenizer, ["", "drums"])
    assert hidden.shape == (2, 256, 768)
    assert hidden.dtype == mask.dtype == torch.float32
    assert hidden[0, 0, 0] == 2  # BOS
    assert mask[0].sum() == 1
    assert mask[1].sum() > 1
