"""Warnings in one line: a prompt that is cut, a GPU that is not used. Out of memory: an error in two lines."""

from __future__ import annotations

import ctypes
import errno
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sa3_trt
from helpers.commands import run
from sa3_trt_core import Generator, Request, gpu
from sa3_trt_core.artifacts.manifest import manifest_path
from sa3_trt_core.cli.arguments import run_command
from sa3_trt_core.errors import ToolError, ToolWarning, as_tool_error, memory_error
from sa3_trt_core.text import Tokenizer

SHORT = [
    "--seconds",
    "0.3",
    "--steps",
    "1",
    "--seed",
    "1",
    "--precision",
    "fp32",
    "--backend",
    "onnxruntime",
    "--quiet",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_onnx: Path) -> Tokenizer:
    return Tokenizer(tiny_onnx / "t5gemma" / "tokenizer.json")


def warned(tokenizer: Tokenizer, prompt: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokenizer.encode([prompt])
    return [str(warning.message) for warning in caught if issubclass(warning.category, ToolWarning)]


def test_a_prompt_that_is_cut_is_quoted_where(tokenizer: Tokenizer) -> None:
    for words in ("slow piano and strings, ", "音楽 🎵 ", "Größe "):
        prompt = words * 300 + "no drums"
        (message,) = warned(tokenizer, prompt)
        assert "longer than 256 tokens" in message and "nothing is read after" in message
        last, first = message.split("'")[1], message.split("'")[3]
        assert last + first in prompt and tokenizer.encode([prompt])[1].sum() == 256


def test_a_prompt_that_fits_to_the_last_token_is_not_warned_of(tokenizer: Tokenizer) -> None:
    prompt, step = "a", " a"
    while int(tokenizer.encode([prompt + step])[1].sum()) < 256:
        prompt += step
    assert warned(tokenizer, prompt + step) == [] and warned(tokenizer, "") == []
    assert warned(tokenizer, prompt + step * 2) != []


def test_the_command_says_it_once_and_quiet_does_not_hide_it(tiny_onnx: Path, tmp_path: Path) -> None:
    prompt = "slow piano and strings, " * 200
    argv = [*SHORT, "--prompt", prompt, "--prompt", prompt, "--onnx-root", tiny_onnx, "--out-dir", tmp_path]
    result = run(sa3_trt.main, argv)
    assert result.code == 0 and result.err.count("warning: ") == result.err.count("\n") == 1, result.err


def attribute_of_sm_90(value: Any, attribute: int, device: object) -> int:
    """Answer cuDeviceGetAttribute for the compute capability."""
    value._obj.value = {gpu.COMPUTE_MAJOR: 9, gpu.COMPUTE_MINOR: 0}[attribute]
    return 0


DRIVER = SimpleNamespace(
    cuInit=lambda flags: 0, cuDeviceGet=lambda device, ordinal: 0, cuDeviceGetAttribute=attribute_of_sm_90
)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put in a driver that reports a GPU; the installed packages are those for a CPU."""
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name, *rest: DRIVER if name == "libcuda.so.1" else load(name, *rest))
    gpu.current_arch.cache_clear()
    yield
    gpu.current_arch.cache_clear()


@pytest.mark.usefixtures("with_gpu")
def test_a_gpu_that_is_not_used_is_said_once_with_the_reason(tiny_onnx: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Generator.load(precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx) as generator:
            assert set(generator.engines.devices.values()) == {"cpu"}
    (message,) = [str(warning.message) for warning in caught if issubclass(warning.category, ToolWarning)]
    assert message.startswith("text, dit, decoder on the CPU") and "onnxruntime-gpu" in message


def test_the_device_of_each_stage_is_shown(tiny_onnx: Path, tmp_path: Path) -> None:
    argv = [*SHORT, "--prompt", "x", "--onnx-root", tiny_onnx, "--out", tmp_path / "a.wav"]
    table = run(sa3_trt.main, argv)
    assert table.err == "" and {"text", "sample", "decode"} <= {
        row.split()[0] for row in table.out.splitlines() if row.split()[2:3] == ["cpu"]
    }
    assert '"dit": "cpu"' in run(sa3_trt.main, [*argv, "--json"]).out


def test_guidance_of_a_dit_without_the_null_rule_is_said(tiny_onnx: Path, tmp_path: Path) -> None:
    """A DiT without a manifest, as on the hub, may have no such rule; one of our export notes that it has."""
    old = shutil.copytree(tiny_onnx, tmp_path / "old")
    manifest_path(old / "sa3-m" / "dit.onnx").unlink()
    for root, negative, expected in ((old, None, 1), (old, "drums", 0), (tiny_onnx, None, 0)):
        loaded = Generator.load(precision="fp32", backend="onnxruntime", onnx_root=root)
        with loaded as generator, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generator.generate(Request("x", 0.3, 1, cfg=3.0, negative_prompt=negative))
        messages = [str(warning.message) for warning in caught if issubclass(warning.category, ToolWarning)]
        assert len(messages) == expected and all("unconditional row" in message for message in messages)


def torch_refuses() -> None:
    torch.empty(1 << 45, dtype=torch.float64)


def numpy_refuses() -> None:
    np.ones(1 << 45)


MEMORY = [
    ("Failed to allocate memory for requested buffer of size 9437184", "9.4 MB"),
    ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has", "2.50 GiB"),
    ("BFCArena::AllocateRawInternal Available memory of 1 is smaller than requested bytes of 5000000", "5.0"),
    ("std::bad_alloc", ""), ("bad allocation", ""), ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", ""),
    ("can't start new thread", ""), ("pthread_create failed, error code: 11", ""),
    ("libx.so: failed to map segment from shared object", ""),
]  # fmt: skip


@pytest.mark.parametrize(("words", "size"), MEMORY)
def test_what_libraries_say_when_memory_ends(words: str, size: str) -> None:
    error = memory_error(RuntimeError(words))
    assert error is not None and "out of memory" in error.message and size in error.message
    assert "shorter length" in error.hint
    assert memory_error(RuntimeError("shapes do not match: memory layout")) is None


@pytest.mark.parametrize("refuses", [torch_refuses, numpy_refuses])
def test_real_allocations_that_fail_are_two_lines(refuses, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run_command(lambda: refuses() or 0) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "out of memory" in lines[0] and "requested" in lines[0], lines


def test_causes_are_looked_at_and_our_own_bugs_are_not_hidden() -> None:
    try:
        try:
            raise OSError(errno.ENAMETOOLONG, "File name too long", "n" * 300)
        except OSError as error:
            raise RuntimeError("a library's own words") from error
    except RuntimeError as error:
        known = as_tool_error(error)
    assert isinstance(known, ToolError) and "File name too long" in known.message and len(known.message) < 200
    for bug in (KeyError("x"), RuntimeError("x"), ValueError("x"), OSError("x"), AssertionError()):
        assert as_tool_error(bug) is None
