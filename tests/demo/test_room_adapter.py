"""The shipped adapter changes the score as intended; training one of a tiny model writes a native file."""

from __future__ import annotations

from pathlib import Path

import make_demo_checkpoint
import numpy as np
import pytest
import train_demo_lora

from helpers.commands import ROOT, assert_user_error, run
from reprompt import deployed_text
from sa3_demo import listen
from sa3_demo.checkpoint_under_test import CheckpointUnderTest, GenerationRow
from sa3_demo.music import FIRST_HELD_OUT, draw_piece
from sa3_demo.room_adapter import WALL_HZ, low_pass
from sa3_trt_core.lora.adapter import read_adapter
from sa3_trt_core.lora.lora_set import LoraSet, LoraSpec
from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation import listener

SHIPPED = ROOT / "interface" / "demo_model" / "room.safetensors"
FULL_SCALE = 32767.0


@pytest.fixture(scope="module")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    result = run(make_demo_checkpoint.main, ["--out", folder])
    assert result.code == 0, result.err
    return folder


def test_the_shipped_adapter_takes_the_treble_and_leaves_the_bass(demo_checkpoint: Path) -> None:
    piece = draw_piece(FIRST_HELD_OUT, 4)
    row = GenerationRow(deployed_text(piece.example()), 0)
    levels, tempos = [], []
    for loras in (LoraSet(), LoraSet.read([LoraSpec(SHIPPED)])):
        subject = CheckpointUnderTest(demo_checkpoint, 4, 8, 1, loras=loras)
        clip = subject.decode(subject.latents([row])) / FULL_SCALE
        levels.append(listen.band_levels(clip, SAMPLE_RATE))
        tempos.append(listener.estimate_tempo(clip, SAMPLE_RATE))
    change = {band: levels[1][band] - levels[0][band] for band in levels[0]}
    assert change["4000-8000 Hz"] < -8 and change["8000-16000 Hz"] < -8, change
    assert abs(change["20-120 Hz"]) < 5 and abs(change["120-250 Hz"]) < 5, change
    assert all(tempo == pytest.approx(piece.bpm, rel=0.04) for tempo in tempos)


def test_the_shipped_file_is_small_and_whole() -> None:
    assert SHIPPED.stat().st_size < 1_000_000
    adapter = read_adapter(SHIPPED)
    assert (adapter.kind.name, adapter.ranks, len(adapter.layers), adapter.notes) == ("lora", [8], 21, ())


def test_training_writes_a_native_adapter_that_fits_the_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.safetensors"
    argv = ["--checkpoint", tiny_checkpoint, "--out", out, "--captions", 1, "--seconds", 1, "--steps", 2, "--batch", 2,
            "--rank", 2]  # fmt: skip
    result = run(train_demo_lora.main, argv)
    assert result.code == 0, result.err
    adapter = read_adapter(out)
    assert (adapter.kind.name, adapter.ranks, len(adapter.layers)) == ("lora", [2], 7)
    qkv = adapter.layers["model.transformer.layers.0.self_attn.to_qkv"].tensors
    assert qkv["lora_B"].shape == (640, 2) and bool(qkv["lora_B"].any())


def test_a_device_that_is_not_there_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    line = ["--checkpoint", tiny_checkpoint, "--out", tmp_path / "a.safetensors", "--device", "cuda:99"]
    assert_user_error(run(train_demo_lora.main, line), "--device cuda:99")
    assert not list(tmp_path.iterdir())


def test_the_wall_halves_nothing_below_its_corner_and_little_is_left_above() -> None:
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for frequency, low, high in ((100.0, 1.5, 1.7), (WALL_HZ * 8, 0.0, 0.01)):
        tone = np.stack([0.2 * np.sin(2 * np.pi * frequency * time)] * 2)
        gain = float(np.sqrt(np.square(low_pass(tone)).mean() / np.square(tone).mean()))
        assert low <= gain <= high
