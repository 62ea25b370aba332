"""Calibration capture: rows are the model's inputs; capture streams, resumes and is reproducible to the byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import make_calib
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from helpers.commands import kill_when, run
from sa3_build.calibration.capture import CheckpointModel
from sa3_build.calibration.writer import CalibrationWriter
from sa3_trt_core import shapes
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.artifacts.calibration_layout import KEYS, row_shape
from sa3_trt_core.artifacts.calibration_set import CalibrationSet
from sa3_trt_core.sampling import schedule
from sa3_trt_core.sampling.sampler import denoised

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = ("--prompts", "2", "--duration", "0.5", "--steps", "4", "--cover", "text")  # of the fixture tiny_calib


def command(checkpoint: Path, out: Path, *more: str) -> list[str]:
    argv = [
        "--model-config",
        str(checkpoint / "model_config.json"),
        "--checkpoint",
        str(checkpoint / "model.safetensors"),
    ]
    return [*argv, "--out", str(out), *more]


def test_the_file_is_a_plain_npz_of_the_contract(tiny_calib: Path) -> None:
    with np.load(tiny_calib, allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted(KEYS)
        rows, frames = 8, shapes.valid_frames(0.5, shapes.latent_frames(0.5))
        for key in KEYS:
            assert archive[key].dtype == np.float32
            assert archive[key].shape == (rows, *row_shape(key, frames))


def test_rows_are_the_models_own_trajectory(tiny_checkpoint: Path, tiny_calib: Path) -> None:
    """Each row follows from the one before it by the ping-pong step, and each prompt starts from its seed's noise."""
    model = CheckpointModel(tiny_checkpoint / "model_config.json", tiny_checkpoint / "model.safetensors", "cpu")
    levels = schedule.sigmas(4)
    rows = list(CalibrationSet.open(tiny_calib))
    assert [float(row["t"][0]) for row in rows] == pytest.approx(levels[:-1].tolist() * 2)
    for prompt in range(2):
        generator = torch.Generator().manual_seed(1528 + prompt)
        x = torch.randn(1, 256, rows[0]["x"].shape[-1], generator=generator)
        for step in range(4):
            row = {key: torch.from_numpy(value.copy()) for key, value in rows[4 * prompt + step].items()}
            assert torch.allclose(row["x"], x, atol=1e-5)
            with torch.inference_mode():
                velocity = model.module(*(row[key] for key in KEYS))
            noise = torch.randn(x.shape, generator=generator)
            x = (1 - levels[step + 1]) * denoised(x, velocity, levels[step]) + levels[step + 1] * noise
    assert not np.array_equal(rows[0]["t5_hidden"], rows[4]["t5_hidden"])
    assert all((row["local_add_cond"] == 0).all() and row["seconds_total"][0] == 0.5 for row in rows)


def test_the_summary_says_what_was_captured(tiny_checkpoint: Path, tiny_calib: Path) -> None:
    made = manifest.read_manifest(tiny_calib)
    assert made.gates["rows"] == 8
    assert made.gates["latent_frames"] == [shapes.latent_frames(0.5)]
    assert made.gates["kinds"] == {"text": {str(shapes.latent_frames(0.5)): 8}}
    assert made.gates["sigmas"] == pytest.approx(schedule.sigmas(4)[:-1].tolist(), abs=1e-6)
    low, high = made.gates["ranges"]["x"]
    assert low < -2 < 2 < high
    code, printed, _ = run(make_calib.main, command(tiny_checkpoint, tiny_calib, *SETTINGS))
    assert code == 0 and "is current" in printed


def test_a_killed_capture_resumes_and_gives_the_same_bytes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Rows of every kind and two lengths; the killed run resumes at the prompt it was working on."""
    out, whole = tmp_path / "a.calib.npz", tmp_path / "b.calib.npz"

    def line(target: Path) -> list[str]:
        size = ["--prompts", "4", "--duration", "4", "0.5", "--steps", "4"]
        return [sys.executable, str(ROOT / "build/make_calib.py"), *command(tiny_checkpoint, target, *size)]

    note = tmp_path / f".{out.name}.partial" / "progress.json"
    kill_when(line(out), lambda: note.exists() and json.loads(note.read_text())["done"] >= 8)
    assert not out.exists()
    done = json.loads(note.read_text())["done"]
    again = subprocess.run(line(out), capture_output=True, text=True, check=True)
    assert done in (8, 16, 24) and "32/32" in again.stderr
    assert not note.parent.exists()
    subprocess.run(line(whole), capture_output=True, check=True)
    assert out.read_bytes() == whole.read_bytes()


def test_an_unfinished_folder_of_other_settings_is_not_used(tmp_path: Path) -> None:
    row = {key: np.ones((1, *row_shape(key, 3)), np.float32) for key in KEYS}
    writer = CalibrationWriter(tmp_path / "x.npz", 2, 3, {"seed": 1})
    writer.append(row)
    writer.commit()
    assert CalibrationWriter(tmp_path / "x.npz", 2, 3, {"seed": 1}).done == 1
    assert CalibrationWriter(tmp_path / "x.npz", 2, 3, {"seed": 2}).done == 0


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), frames=st.integers(1, 6), seed=st.integers(0, 99))
def test_rows_come_back_in_order(tmp_path_factory, rows: int, frames: int, seed: int) -> None:
    target = tmp_path_factory.mktemp("calib") / "x.npz"
    rng = np.random.default_rng(seed)
    written = []
    writer = CalibrationWriter(target, rows, frames, {})
    for _ in range(rows):
        row = {key: rng.random((1, *row_shape(key, frames)), np.float32) for key in KEYS}
        row["t5_mask"] = np.round(row["t5_mask"])
        writer.append(row)
        written.append(row)
    writer.finish()
    calibration = CalibrationSet.open(target)
    assert (calibration.rows, calibration.frames) == (rows, frames)
    for first, second in zip(written, calibration, strict=True):
        assert all(np.array_equal(first[key], second[key]) for key in KEYS)
    assert calibration.check_values()["x"][1] == max(float(row["x"].max()) for row in written)
    assert calibration.sigmas() == [float(row["t"][0]) for row in written]
