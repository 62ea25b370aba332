"""The command on a machine without models: it writes a sound, or prints one command to run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

import sa3_trt
from helpers import hub_server
from helpers.commands import assert_user_error, run
from helpers.hub_server import InjectedResponse, LocalHub
from sa3_trt_core import model_loader
from sa3_trt_core.engines import BACKENDS
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import (
    CHECKPOINT_REPOSITORY,
    CHECKPOINT_TOKENIZER_FOLDER,
    HUB_FOLDER,
    HUB_REPOSITORY,
    TOKENIZER_FILES,
    find_target,
)

STAGES = ("text", "encode", "dit", "decoder")
NEEDED = ("t5gemma", "sa3-m-fp8", "same-l-decoder")


@pytest.fixture
def local(tiny_fp8: Path, tmp_path: Path) -> Iterator[LocalHub]:
    """Run a hub with the files that text-to-audio in FP8 needs, and a client with an empty cache."""
    files = {}
    for target in (find_target(name) for name in NEEDED):
        for name in (target.onnx[0], f"{target.onnx[0]}.data"):
            files[f"{HUB_FOLDER}/{name}"] = (tiny_fp8 / name).read_bytes()
    tokenizer = {
        f"{CHECKPOINT_TOKENIZER_FOLDER}/{Path(name).name}": (tiny_fp8 / name).read_bytes() for name in TOKENIZER_FILES
    }
    with hub_server.serve() as server:
        server.commit(HUB_REPOSITORY, files)
        server.commit(CHECKPOINT_REPOSITORY, tokenizer)
        with hub_server.client_at(server.address, tmp_path / "cache"):
            yield server


def sound(out: Path, *words: object) -> None:
    argv = ["--prompt", "x", "--precision", "fp8", "--seconds", 0.5, "--steps", 1, "--seed", 1, "--out", out]
    result = run(sa3_trt.main, [*argv, "--models-dir", out.parent / "models", "--quiet", *words])
    assert result.code == 0, result.err
    assert soundfile.info(out).frames == 22050


def test_it_ends_with_a_sound_and_then_needs_no_network(local: LocalHub, tmp_path: Path) -> None:
    sound(tmp_path / "a.wav")
    requests_before = len(local.asked)
    assert requests_before > 0
    sound(tmp_path / "b.wav", "--offline")
    assert len(local.asked) == requests_before
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


@pytest.mark.parametrize(
    ("file", "answer", "words", "command"),
    [
        (
            "onnx/sa3-m/dit_fp8.onnx",
            InjectedResponse(404, "EntryNotFound"),
            "is not published yet",
            "build/build_dit_fp8.py",
        ),
        ("onnx/same-l/dec_fp16.onnx", InjectedResponse(403, "GatedRepo"), "no access to", "hf auth login"),
        ("t5gemma-b-b-ul2/tokenizer.json", InjectedResponse(401, "GatedRepo"), "no access to", "hf auth login"),
    ],
)
def test_or_with_one_command_to_type(  # the fixture and the four
    local: LocalHub, tmp_path: Path, file: str, answer: InjectedResponse, words: str, command: str
) -> None:
    local.refuse[file] = answer
    argv = ["--prompt", "x", "--precision", "fp8", "--seconds", 0.5, "--out", tmp_path / "a.wav", "--quiet"]
    result = run(sa3_trt.main, [*argv, "--models-dir", tmp_path / "models"])
    assert_user_error(result, words)
    assert command in result.err.splitlines()[1]
    assert not (tmp_path / "a.wav").exists()


def test_every_missing_engine_is_in_one_command(tmp_path: Path) -> None:
    """The message of a GPU host without engines."""
    plan = replace(
        model_loader.make_plan("medium", "fp8", "auto", ModelSource(tmp_path, tmp_path)),
        backends=dict.fromkeys(STAGES, "tensorrt"),
    )
    build = "python build/build_from_onnx.py"
    folders = f"--backend tensorrt --arch sm_89 --models-dir {tmp_path}"
    assert model_loader.build_command(plan, "sm_89") == f"{build} t5gemma sa3-m-fp8 same-l-decoder {folders}"
    for name, left in (("sa3-m-fp8", "t5gemma same-l-decoder"), ("t5gemma", "same-l-decoder"), ("same-l-decoder", "")):
        engine = BACKENDS["tensorrt"].engine_path(tmp_path, "sm_89", find_target(name))
        engine.parent.mkdir(parents=True)
        engine.touch()
        assert model_loader.build_command(plan, "sm_89") == (f"{build} {left} {folders}" if left else None)
