"""The command sa3_trt on a tiny model: native generation, one sound per seed, the requested length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sa3_trt
from helpers.commands import run
from sa3_build.calibration.capture import CheckpointModel
from sa3_trt_core import shapes
from sa3_trt_core.sampling import schedule

PROMPT = "slow piano, 70 BPM"
BASE = ["--prompt", PROMPT, "--backend", "onnxruntime", "--quiet"]


def generate(root: Path, out: Path, *more: str) -> dict:
    argv = [*BASE, "--onnx-root", str(root), "--out", str(out), "--json", *more]
    code, printed, errors = run(sa3_trt.main, argv)
    assert code == 0, errors
    return json.loads(printed)


@pytest.mark.parametrize(("seconds", "frames", "valid"), [("5", 120, 118), ("12.34", 198, 197)])
def test_latents_are_the_models_own(
    tiny_checkpoint: Path, tiny_onnx: Path, tmp_path: Path, seconds, frames, valid
) -> None:
    """fp32 engines give the latents of the checkpoint in torch."""
    saved = tmp_path / "l.npz"
    more = ["--seconds", seconds, "--seed", "11", "--precision", "fp32", "--save-latents", str(saved)]
    (row,) = generate(tiny_onnx, tmp_path / "x.wav", *more)["rows"]
    assert (row["frames"], row["valid_frames"]) == (frames, valid)
    model = CheckpointModel(tiny_checkpoint / "model_config.json", tiny_checkpoint / "model.safetensors", "cpu")
    expected = model.generate(PROMPT, float(seconds), 8, 11).numpy()
    with np.load(saved, allow_pickle=False) as archive:
        assert archive["latents"].shape == (1, 256, valid)
        assert np.abs(archive["latents"] - expected).max() <= 5e-5
        assert np.array_equal(archive["sigmas"], schedule.sigmas(8).numpy())


@pytest.mark.parametrize("precision", ["fp32", "fp16mixed", "fp8"])
def test_the_sound_has_the_length_asked_for_and_is_one(tiny_fp8: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "x.wav"
    generate(tiny_fp8, out, "--precision", precision, "--seconds", "3.21", "--seed", "4", "--steps", "4")
    info = soundfile.info(out)
    assert (info.samplerate, info.channels, info.subtype) == (44100, 2, "PCM_16")
    assert info.frames == int(3.21 * 44100)
    samples, _ = soundfile.read(out)
    assert 0.01 < np.sqrt(np.square(samples).mean()) < 0.5
    assert np.abs(samples).max() < 0.999


def test_fp8_pairs_with_the_half_decoder(tiny_fp8: Path, tmp_path: Path) -> None:
    made = generate(tiny_fp8, tmp_path / "x.wav", "--precision", "fp8", "--seconds", "1", "--steps", "1")
    assert [name for name, _ in made["engines"].values()] == ["t5gemma", "sa3-m-fp8", "same-l-decoder"]


def test_one_seed_gives_the_same_latents_in_two_processes(tiny_fp8: Path, tmp_path: Path) -> None:
    latents = []
    for name in ("a", "b"):
        saved = tmp_path / f"{name}.npz"
        argv = [
            sys.executable,
            "-m",
            "sa3_trt",
            *BASE,
            "--onnx-root",
            str(tiny_fp8),
            "--precision",
            "fp8",
            "--seed",
            "9",
        ]
        argv += ["--seconds", "2", "--steps", "3", "--out", str(tmp_path / f"{name}.wav"), "--save-latents", str(saved)]
        subprocess.run(argv, check=True, capture_output=True)
        latents.append(np.load(saved)["latents"])
    assert np.array_equal(*latents)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_another_seed_prompt_or_length_gives_another_sound(tiny_onnx: Path, tmp_path: Path) -> None:
    sounds = []
    for number, more in enumerate((["--seed", "1"], ["--seed", "2"], ["--seed", "1", "--seconds", "1.5"])):
        saved = tmp_path / f"{number}.npz"
        options = ["--seconds", "1", *more, "--steps", "2", "--save-latents", str(saved)]
        generate(tiny_onnx, tmp_path / f"{number}.wav", *options)
        sounds.append(np.load(saved)["latents"][..., :64])
    code, _, _ = run(
        sa3_trt.main,
        ["--prompt", "metal", *BASE[2:], "--onnx-root", str(tiny_onnx), "--seed", "1", "--seconds", "1", "--steps", "2",
         "--out", str(tmp_path / "3.wav"), "--save-latents", str(tmp_path / "3.npz")],
    )  # fmt: skip
    assert code == 0
    sounds.append(np.load(tmp_path / "3.npz")["latents"][..., :64])
    for index, first in enumerate(sounds):
        assert all(np.abs(first - second).max() > 1e-3 for second in sounds[index + 1 :])


def test_a_batch_equals_its_rows(tiny_fp8: Path) -> None:
    """A batch of 3 equals three single rows through the same engine."""
    from sa3_build.export import torch_to_onnx
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
    from sa3_trt_core.targets import dit_target

    inputs = torch_to_onnx.example_inputs("dit", batch=3, frames=24, seed=3)
    names = [spec.name for spec in shapes.CONTRACTS["dit"].inputs]
    for precision, tolerance in (("fp32", 2e-5), ("fp16mixed", 1e-2), ("fp8", 1e-1)):
        with OnnxRuntimeEngine(tiny_fp8 / dit_target("medium", precision).onnx[0]) as engine:
            together = engine.run(dict(zip(names, inputs, strict=True)))["velocity"]
            for row in range(3):
                alone = engine.run({name: value[row : row + 1] for name, value in zip(names, inputs, strict=True)})[
                    "velocity"
                ]
                assert torch.abs(together[row] - alone[0]).max() <= tolerance
