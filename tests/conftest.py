"""Session fixtures: a tiny native checkpoint and the artefacts that the project's own commands build from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from helpers.commands import run
from sa3_trt_core.targets import find_target


def onnx_of(root: Path, target: str) -> Path:
    """Return the path of a target's graph under an ONNX root."""
    return root / find_target(target).onnx[0]


def run_checked(main, argv: list[object]) -> None:  # type: ignore[no-untyped-def]
    """Run a command and fail the test with its stderr unless it exits with 0."""
    result = run(main, argv)
    assert result.code == 0, result.err


def build_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return this process's copy of the folder `name`, which the first of the parallel test processes fills by `make`.

    Each process gets its own copy: a build hard-links its source's sidecar while it runs, and onnx refuses to read
    a file with several links.
    """
    base = tmp_path_factory.getbasetemp()
    if not base.name.startswith("popen-"):  # as those of pytest-xdist's workers are
        (base / name).mkdir()
        make(base / name)
        return base / name
    folder = base.parent / name
    with FileLock(f"{folder}.lock"):
        if not folder.with_suffix(".done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            folder.with_suffix(".done").touch()
    return Path(shutil.copytree(folder, base / name))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a native checkpoint folder: embed 128, 2 heads, 1 layer. Read only: copy it before changing it."""
    import make_demo_checkpoint

    argv = ["--random", "--width", 128, "--depth", 1, "--out"]
    return build_once(
        tmp_path_factory, "tiny-checkpoint",
        lambda folder: run_checked(make_demo_checkpoint.main, [*argv, folder / "checkpoint"]),
    ) / "checkpoint"  # fmt: skip


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ONNX root with every graph exported from the checkpoint, and the FP16-mixed DiT. Read only."""
    import build_dit_fp16mixed
    import export_onnx

    def make(root: Path) -> None:
        run_checked(export_onnx.main, ["--model-dir", tiny_checkpoint, "--onnx-root", root])
        run_checked(
            build_dit_fp16mixed.main, ["--input", onnx_of(root, "sa3-m-fp32"), "--onnx", onnx_of(root, "sa3-m")]
        )

    return build_once(tmp_path_factory, "tiny-onnx", make)


@pytest.fixture(scope="session")
def tiny_calib(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a calibration set: 2 prompts of 4 steps, 8 text rows of 70 latent frames, rectangular. Read only."""
    import make_calib

    config, weights = tiny_checkpoint / "model_config.json", tiny_checkpoint / "model.safetensors"
    argv = ["--model-config", config, "--checkpoint", weights]
    argv += ["--prompts", 2, "--duration", 0.5, "--steps", 4, "--cover", "text", "--out"]
    name = "sa3-m.calib.npz"
    return (
        build_once(tmp_path_factory, "tiny-calib", lambda folder: run_checked(make_calib.main, [*argv, folder / name]))
        / name
    )


@pytest.fixture(scope="session")
def tiny_fp8(tiny_onnx: Path, tiny_calib: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an ONNX root like `tiny_onnx` that holds the FP8 DiT too. Read only."""
    import build_dit_fp8

    def make(root: Path) -> None:
        shutil.copytree(tiny_onnx, root, dirs_exist_ok=True)
        argv = ["--input", onnx_of(root, "sa3-m"), "--calib", tiny_calib, "--onnx", onnx_of(root, "sa3-m-fp8")]
        run_checked(build_dit_fp8.main, [*argv, "--parity-rows", 8])

    return build_once(tmp_path_factory, "tiny-fp8", make)
