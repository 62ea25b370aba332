"""One model at a time, one device of several, and several at once with a worker that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sa3_trt
from helpers.commands import Done, run, two_lines
from sa3_trt_core import Generator, Request
from sa3_trt_core.cli import devices
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import count_stages

BASE = Request("slow piano", 1.0, steps=2, seed=1)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (44_100, 2)), 44_100, subtype="FLOAT")
    return path


def test_one_model_at_a_time_gives_the_same_sounds(tiny_onnx: Path, sound: Path) -> None:
    rows = [BASE, replace(BASE, seed=2, init_audio=sound, init_noise_level=0.5), replace(BASE, seed=3, cfg=2.0)]
    rows.append(replace(BASE, prompt="techno", seed=4))
    settings = {"precision": "fp32", "backend": "onnxruntime", "onnx_root": tiny_onnx}
    with Generator.load(**settings) as generator:
        wanted = dict(generator.generate_many(rows, batch=2))
        assert set(generator.engines.open_stages) == {"text", "encode", "dit", "decoder"}
    opened: list[str] = []
    with Generator.load(**settings, free_models=True, on_engine=lambda *step: opened.append(step[0])) as generator:
        seen = []

        def look(stage: str, index: int, total: int) -> None:
            seen.append(generator.engines.open_stages)

        for _ in range(2):  # it can be called again
            found = dict(generator.generate_many(rows, 2, look))
            assert generator.engines.open_stages == ()
        with pytest.raises(ToolError, match="all models at once"):
            next(generator.generate_ring(rows, 2))
    assert opened == [] and len(seen) == 2 * count_stages(rows, 2)
    order = [stages for place, stages in enumerate(seen) if place == 0 or stages != seen[place - 1]]
    assert order == 2 * [("text",), ("encode",), ("dit",), ("decoder",)]
    for index, result in wanted.items():
        assert torch.equal(found[index].latents, result.latents) and torch.equal(found[index].audio, result.audio)
    assert found[0].timings["load"] > 0


def test_a_device_is_chosen_among_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VISIBLE, "GPU-a, GPU-b")
    assert devices.choose_devices(None, "1,cpu,0") == ("1", "cpu", "0")
    assert os.environ[devices.VISIBLE] == "GPU-a, GPU-b"
    with pytest.raises(ToolError, match="no GPU 2 here: 2 visible"):
        devices.choose_devices("2", None)
    assert devices.choose_devices("1", None) == ()
    assert os.environ[devices.VISIBLE] == "GPU-b"
    devices.choose_devices("cpu", None)
    assert os.environ[devices.VISIBLE] == ""


def command(root: Path, *more: object) -> list[str]:
    line = [sys.executable, "-m", "sa3_trt", "--onnx-root", root, "--backend", "onnxruntime", "--precision", "fp32"]
    return [str(word) for word in [*line, "--seconds", 1, "--steps", 2, "--seed", 3, "--bits", "32f", *more]]


def workers_of(process: subprocess.Popen[str]) -> Iterator[int]:
    """The ids of the worker processes that a command has started itself."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_text()
        except OSError:
            continue
        if parent == process.pid and "spawn_main" in words:
            yield int(folder.name)


def killing(line: list[str], count: int) -> Done:
    """Run a command and kill that many of its workers, each as soon as it is there."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed: set[int] = set()
    deadline = time.monotonic() + 120
    while len(killed) < count and process.poll() is None and time.monotonic() < deadline:
        for worker in workers_of(process):
            if worker not in killed and len(killed) < count:
                os.kill(worker, signal.SIGKILL)
                killed.add(worker)
        time.sleep(0.01)
    out, err = process.communicate(timeout=120)
    assert len(killed) == count, err
    return Done(process.returncode, out, err)


def test_rows_of_a_killed_worker_are_made_by_another(tiny_onnx: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\nfour\nfive\n")
    line = command(tiny_onnx, "--prompts-file", prompts)
    done = killing([*line, "--free-models", "--json", "--devices", "cpu,cpu", "--out-dir", str(tmp_path / "two")], 1)
    assert done.code == 0, done.err
    assert "the worker on device cpu was lost; rows " in done.err and "are tried once more" in done.err
    assert "generate: 5/5 sounds 100%" in done.err
    document = json.loads(done.out)
    names = [f"{number:03d}_{word}_{2 + number}.wav" for number, word in enumerate(prompts.read_text().split(), 1)]
    assert [Path(row["out"]).name for row in document["rows"]] == names
    assert document["generations_per_second"] > 0 and all(row["peak"] > 0.01 for row in document["rows"])
    assert run(sa3_trt.main, [*line[3:], "--out-dir", tmp_path / "one", "--quiet"]).code == 0
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        first, second = (soundfile.read(tmp_path / folder / name)[0] for folder in ("one", "two"))
        assert np.abs(first - second).max() <= 1e-4


def test_rows_that_are_lost_twice_are_told(tiny_onnx: Path, tmp_path: Path) -> None:
    line = command(tiny_onnx, "--prompt", "a", "--devices", "cpu", "--quiet", "--out-dir", tmp_path / "out")
    done = killing(line, 2)
    first, *rest = done.err.splitlines()
    assert first == "the worker on device cpu was lost; rows 1 are tried once more"
    two_lines(Done(done.code, done.out, "\n".join(rest)), "1 of 1 sounds are missing, rows 1")
    assert not (tmp_path / "out").exists()


def test_what_a_worker_refuses_is_two_lines(tiny_onnx: Path, tmp_path: Path) -> None:
    line = command(tiny_onnx, "--prompt", "a", "--prompt", "b", "--devices", "cpu", "--quiet", "--peak", "limit")
    done = subprocess.run([*line, "--out-dir", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    two_lines(Done(done.returncode, done.stdout, done.stderr), "--peak limit")
    assert not (tmp_path / "out").exists()


def test_a_ring_in_a_worker_makes_the_same_sounds(tiny_onnx: Path, tmp_path: Path) -> None:
    line = command(tiny_onnx, "--prompt", "a", "--prompt", "b", "--prompt", "c", "--quiet")
    more = ["--depth", "2", "--devices", "cpu", "--out-dir", str(tmp_path / "ring")]
    assert subprocess.run([*line, *more], capture_output=True, text=True, check=False).returncode == 0
    assert run(sa3_trt.main, [*line[3:], "--out-dir", tmp_path / "serial"]).code == 0
    sounds = [[soundfile.read(path)[0] for path in sorted((tmp_path / name).iterdir())] for name in ("ring", "serial")]
    assert len(sounds[0]) == 3
    assert all(np.abs(first - second).max() <= 1e-4 for first, second in zip(*sounds, strict=True))
