"""One tiny native checkpoint and everything made from it by the project's own commands, built once a test run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.commands import run
from sa3_trt_core.targets import find_target


def onnx_of(root: Path, target: str) -> Path:
    """Where a target's graph lies under an ONNX root."""
    return root / find_target(target).onnx[0]


def made(main, argv: list[object]) -> None:  # type: ignore[no-untyped-def]
    """Run a producing command; what it said is the message of a failure."""
    done = run(main, argv)
    assert done.code == 0, done.err


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native checkpoint folder: embed 128, 2 heads, 1 layer. Read only: copy it before changing it."""
    import make_demo_checkpoint

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    made(make_demo_checkpoint.main, ["--random", "--out", folder, "--width", 128, "--depth", 1])
    return folder


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX root with all that the checkpoint gives, and the FP16-mixed DiT. Read only."""
    import build_dit_fp16mixed
    import export_onnx

    root = tmp_path_factory.mktemp("tiny") / "onnx"
    made(export_onnx.main, ["--model-dir", tiny_checkpoint, "--onnx-root", root])
    made(
        build_dit_fp16mixed.main,
        ["--input", onnx_of(root, "sa3-m-fp32"), "--onnx", onnx_of(root, "sa3-m")],
    )
    return root


@pytest.fixture(scope="session")
def tiny_calib(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration set: 2 prompts of 4 steps, 8 text rows of 70 latent frames, in the rectangular form. Read only."""
    import make_calib

    path = tmp_path_factory.mktemp("tiny") / "sa3-m.calib.npz"
    config, weights = tiny_checkpoint / "model_config.json", tiny_checkpoint / "model.safetensors"
    line = ["--model-config", config, "--checkpoint", weights, "--out", path]
    made(make_calib.main, [*line, "--prompts", 2, "--duration", 0.5, "--steps", 4, "--cover", "text"])
    return path


@pytest.fixture(scope="session")
def tiny_fp8(tiny_onnx: Path, tiny_calib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX root like `tiny_onnx` that holds the FP8 DiT too. Read only."""
    import build_dit_fp8

    root = tmp_path_factory.mktemp("tiny") / "onnx"
    shutil.copytree(tiny_onnx, root)
    line = ["--input", onnx_of(root, "sa3-m"), "--calib", tiny_calib, "--onnx", onnx_of(root, "sa3-m-fp8")]
    made(build_dit_fp8.main, [*line, "--parity-rows", 8])
    return root
