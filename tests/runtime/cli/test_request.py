"""Requests: contradictions exit with two lines and write nothing; batches, file names, prompts files."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings, strategies as st

import sa3_trt
from helpers.commands import assert_user_error, listing, run
from sa3_trt_core import Request, shapes
from sa3_trt_core.cli import prompts
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import batches
from sa3_trt_core.sampling import inpainting

SAY = ["--prompt", "x"]
INIT = [*SAY, "--init-audio", "tone.wav"]
BAD = [
    ([*SAY, "--inpaint-range", "1,2"], "--inpaint-range needs"),
    ([*SAY, "--init-noise-level", "0.5"], "--init-noise-level needs"),
    ([*SAY, "--init-start", "1"], "--init-start needs"),
    ([*SAY, "--paste-kept"], "--paste-kept needs"),
    (INIT, "--init-audio needs --init-noise-level or --inpaint-range"),
    ([*INIT, "--init-noise-level", "0.5", "--paste-kept"], "--paste-kept is for"),
    ([*INIT, "--init-noise-level", "0.001"], "outside 0.01 to 1"),
    ([*INIT, "--inpaint-range", "1"], "not two numbers"),
    ([*INIT, "--inpaint-range", "2,1"], "2,1"),
    ([*INIT, "--inpaint-range", "1,nan"], "1,nan"),
    ([*INIT, "--inpaint-range", "1,2", "--inpaint-range", "4,31"], "4,31"),
    ([*INIT, "--inpaint-range", "1,1.001"], "no latent frame begins in it"),
    ([*INIT, "--init-noise-level", "0.5", "--init-start", "9"], "ends at 1.00 s"),
    ([*SAY, "--init-audio", "absent.wav", "--init-noise-level", "0.5"], "absent.wav"),
    ([*SAY, "--init-audio", "noise.wav", "--init-noise-level", "0.5"], "noise.wav"),
    ([*SAY, "--init-audio", "four.wav", "--init-noise-level", "0.5"], "4 channels"),
    ([*SAY, "--negative-prompt", "y"], "cfg 1"),
    ([*SAY, "--apg", "0.5"], "cfg 1"),
    ([*SAY, "--apg", "1.5", "--cfg", "3"], "outside 0 to 1"),
    ([*SAY, "--cfg", "3", "--batch", "5"], "batch of 5"),
    ([*SAY, "--batch", "9"], "outside 1 to 8"),
    ([*SAY, "--chunk-frames", "63"], "chunks of 63"),
    ([*SAY, "--chunk-frames", "-1"], "outside 0 to 4096"),
    ([*SAY, "--chunk-frames", "128", "--dit", "sm-music"], "not supported by sm-music"),
    ([*SAY, "--depth", "2", "--free-models"], "--depth and --free-models"),
    ([*SAY, "--device", "99"], "no GPU 99"),
    ([*SAY, "--device", "first"], "'first' is not a device"),
    ([*SAY, "--device", "cpu,cpu"], "more than one"),
    ([*SAY, "--devices", "cpu,"], "'' is not a device"),
    ([*SAY, "--devices", "cpu,-1"], "'-1' is not a device"),
    ([*SAY, "--devices", "0,cpu,0"], "device 0 is named twice"),
    ([*SAY, "--devices", "cpu,99"], "no GPU 99"),
    ([*SAY, "--device", "cpu", "--devices", "cpu,cpu"], "--device and --devices"),
    ([*SAY, "--depth", "9"], "outside 1 to 8"),
    ([*SAY, "--depth", "0"], "outside 1 to 8"),
    ([*SAY, "--cfg", "3", "--depth", "5"], "ring of 5"),
    ([*SAY, "--batch", "1", "--depth", "2"], "--batch and --depth"),
    ([*SAY, *SAY, "--out", "x.wav"], "--out"),
    ([*SAY, *SAY, "--save-latents", "x.npz"], "--save-latents"),
    ([*SAY, "--out", "x.wav", "--out-dir", "d"], "--out"),
    ([*SAY, "--out", "x.wav", "--format", "flac"], "--out"),
    ([*SAY, "--out", "x.aac"], "x.aac"),
    ([*SAY, "--out", "x.flac", "--bits", "32f"], "FLAC"),
    ([*SAY, "--prompts-file", "many.txt"], "--prompts-file"),
    (["--prompts-file", "absent.txt"], "absent.txt"),
    (["--prompts-file", "empty.txt"], "empty.txt"),
    (["--prompts-file", "noise.wav"], "UTF-8"),
    (["--prompts-file", "key.jsonl"], "line 2 has 'sedes'"),
    (["--prompts-file", "kind.jsonl"], "seed is '1'"),
    (["--prompts-file", "broken.jsonl"], "line 1"),
    (["--prompts-file", "long.jsonl"], "seconds 1000"),
    ([], "no prompt"),
]


@pytest.fixture()
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to a folder with sounds and prompts files, valid and invalid; return it."""
    soundfile.write(tmp_path / "tone.wav", np.zeros((44_100, 2)), 44_100)
    soundfile.write(tmp_path / "four.wav", np.zeros((44_100, 4)), 44_100)
    (tmp_path / "noise.wav").write_bytes(bytes(range(128, 256)) * 9)
    (tmp_path / "many.txt").write_text("one\n\n two \n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "key.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "sedes": 2}\n')
    (tmp_path / "kind.jsonl").write_text('{"prompt": "a", "seed": "1"}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "long.jsonl").write_text('{"prompt": "a", "seconds": 1000}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("line", "words"), BAD, ids=[" ".join(line) for line, _ in BAD])
def test_a_contradiction_is_two_lines_and_nothing_is_written(
    folder: Path, line: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", (folder / "many.txt").open())
    before = listing(folder)
    assert_user_error(run(sa3_trt.main, [*line, "--backend", "onnxruntime"]), words)
    assert listing(folder) == before


def planned(*line: object) -> list[dict]:
    result = run(sa3_trt.main, [*line, "--dry-run", "--json", "--backend", "onnxruntime"])
    assert result.code == 0, result.err
    return json.loads(result.out)["rows"]


def test_rows_get_their_own_seeds_and_predictable_names(folder: Path) -> None:
    rows = planned("--prompts-file", "many.txt", "--seed", 7, "--out-dir", "d", "--format", "flac")
    assert [(row["prompt"], row["seed"], row["out"]) for row in rows] == [
        ("one", 7, "d/001_one_7.flac"), ("two", 8, "d/002_two_8.flac"),
    ]  # fmt: skip
    (row,) = planned("--prompt", "one", "--seed", 7, "--out-dir", "d")
    assert row["out"] == "d/one_7.wav"
    first, second = (planned("--prompt", "a")[0]["seed"] for _ in range(2))
    assert first != second


def test_a_line_may_be_an_object_of_its_own_settings(folder: Path) -> None:
    rows = [{"prompt": "a", "seed": 3, "seconds": 12, "negative_prompt": "n"}, {"prompt": "b"}]
    Path("rows.jsonl").write_text("\n".join([*map(json.dumps, rows), "plain"]))
    assert prompts.read_prompts(Path("rows.jsonl")) == [
        prompts.PromptRow("a", 3, 12, "n"), prompts.PromptRow("b"), prompts.PromptRow("plain")
    ]  # fmt: skip
    planned_rows = planned("--prompts-file", "rows.jsonl", "--seed", 20, "--seconds", 5, "--cfg", 2)
    assert [(row["seed"], row["seconds"]) for row in planned_rows] == [(3, 12), (21, 5), (22, 5)]


def test_the_modes_are_told_apart(folder: Path) -> None:
    assert planned(*SAY)[0]["mode"] == "text"
    assert planned(*INIT, "--init-noise-level", 0.5)[0]["mode"] == "audio-to-audio"
    assert planned(*INIT, "--inpaint-range", "1,2")[0]["mode"] == "inpainting"
    assert planned(*INIT, "--inpaint-range", "1,2", "--init-noise-level", 0.5)[0]["mode"] == "inpainting"


def test_the_published_runtimes_length_rule() -> None:
    lengths = [(0.01, 1), (54.0, 582), (374.4, 4032)]
    assert [(s, Request("x", s, legacy_schedule=True).frames) for s, _ in lengths] == lengths


@pytest.mark.parametrize(
    ("seconds", "ranges", "kept"),
    [
        (5.127, [(1.0, 2.5)], [*range(11), *range(27, 56)]),
        (5.127, [(2.0, 5.127)], range(22)),
        (5.127, [(0.0, 5.127)], []),
        (5.0, [(0.05, 0.2)], [0, *range(3, 54)]),
        (5.0, [(0.1, 0.5), (1.1, 2.2)], [0, 1, *range(6, 12), *range(24, 54)]),
        (12.3, [(3.3333, 7.7777), (9, 9.5), (7, 9.2)], [*range(36), *range(103, 133)]),
    ],
)
def test_the_keep_mask_is_the_models_own(seconds: float, ranges: list[tuple[float, float]], kept: list[int]) -> None:
    """Frames that the native package keeps; none is kept after the end, padding included."""
    frames = shapes.latent_frames(seconds)
    mask = inpainting.keep_mask(seconds, frames, ranges)
    assert mask.shape == (1, 1, frames) and mask[0, 0].nonzero()[:, 0].tolist() == list(kept)


@given(st.floats(0.3, 20.0), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_frame_is_kept_where_its_first_sample_is(seconds: float, shares: list[tuple[float, float]]) -> None:
    ranges = [tuple(sorted((a * seconds, b * seconds))) for a, b in shares]
    frames = shapes.latent_frames(seconds)
    samples = np.ones(frames * 4096)
    for start, end in ranges:
        samples[int(start * 44100) : int(end * 44100)] = 0
    samples[int(seconds * 44100) :] = 0
    assert inpainting.keep_mask(seconds, frames, ranges)[0, 0].tolist() == samples[::4096].tolist()


@given(st.lists(st.sampled_from([2.0, 2.01, 9.0, 40.0]), min_size=1, max_size=12), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_batches_hold_every_row_once_and_equal_lengths_only(lengths: list[float], batch: int) -> None:
    requests = [Request("x", seconds, seed=index) for index, seconds in enumerate(lengths)]
    row_groups = list(batches(requests, batch))
    assert sorted(row for rows in row_groups for row in rows) == list(range(len(requests)))
    assert all(len(rows) <= batch and len({requests[row].batch_key for row in rows}) == 1 for rows in row_groups)
    full = {requests[rows[0]].batch_key for rows in row_groups if len(rows) < batch}
    assert len(full) == sum(len(rows) < batch for rows in row_groups)  # at most one rest a length
    assert [rows[0] for rows in row_groups] == sorted(rows[0] for rows in row_groups)


@pytest.mark.parametrize("bad", [{"seconds": float("nan")}, {"steps": 0}, {"seed": -1}, {"cfg": -1.0}, {"apg": 0.5}])
def test_the_python_door_refuses_the_same(bad: dict) -> None:
    with pytest.raises(ToolError):
        Request("x", **bad)


def test_importing_the_library_is_cheap() -> None:
    code = "import sys, sa3_trt_core; print(sorted({'torch', 'numpy', 'soundfile'} & set(sys.modules)))"
    code += "; from sa3_trt_core import Generator, Request, Result; print('torch' in sys.modules, Request('x').steps)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "False 8"]


def test_a_terminal_is_asked_for_the_prompt(folder: Path) -> None:
    terminal, command_end = pty.openpty()
    argv = [sys.executable, "-m", "sa3_trt", "--dry-run", "--json", "--seed", "1", "--backend", "onnxruntime"]
    process = subprocess.Popen(argv, stdin=command_end, stdout=subprocess.PIPE, stderr=command_end)
    os.write(terminal, b"warm pads\n")
    out, _ = process.communicate(timeout=120)
    os.close(command_end)
    printed = os.read(terminal, 1000).decode()
    os.close(terminal)
    assert process.returncode == 0 and "Prompt: " in printed
    assert json.loads(out)["rows"][0]["prompt"] == "warm pads"
