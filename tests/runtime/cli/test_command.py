"""The command sa3_trt in every mode on a tiny model: files of every format, their contents, the output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import sa3_trt
from helpers.commands import assert_user_error, listing, run
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.targets import find_target

ENGINES = {"text": "t5gemma", "encode": "same-l-encoder", "dit": "sa3-m", "decoder": "same-l-decoder"}
CASES = {
    "text": ([], "x.wav", "16", "PCM_16"),
    "audio-to-audio": (["--init-audio", "tone.ogg", "--init-noise-level", 0.5], "x.wav", "32f", "FLOAT"),
    "inpainting": (
        ["--init-audio", "tone.ogg", "--init-start", 0.25, "--inpaint-range", "0.2,0.6", "--inpaint-range", "0.8,1",
         "--cfg", 2, "--apg", 0.5, "--negative-prompt", "voices"], "x.flac", "24", "PCM_24",
    ),
}  # fmt: skip


@pytest.fixture()
def base(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Change to a folder with a mono sound of another rate; return the flags that all runs share."""
    soundfile.write(tmp_path / "tone.ogg", 0.4 * np.sin(np.arange(48_000) / 20), 48_000)
    monkeypatch.chdir(tmp_path)
    return ["--onnx-root", tiny_onnx, "--backend", "onnxruntime", "--seconds", 1.2, "--steps", 2, "--seed", 3, "--json"]


@pytest.mark.parametrize("mode", CASES)
def test_every_mode_writes_what_is_asked_for(base: list[object], tiny_onnx: Path, mode: str) -> None:
    flags, name, bits, subtype = CASES[mode]
    result = run(
        sa3_trt.main, ["--prompt", "warm pads", *base, *flags, "--out", name, "--bits", bits, "--peak", "normalize"]
    )
    assert result.code == 0, result.err
    assert "generate: " in result.err and "100%" in result.err
    document = json.loads(result.out)
    stages = [stage for stage in ENGINES if stage != "encode" or mode != "text"]
    assert {stage: engine[0] for stage, engine in document["engines"].items()} == {s: ENGINES[s] for s in stages}
    stages_timed = ["load", "text", *(["encode"] if mode != "text" else []), "sample", "decode", "write"]
    assert list(document["timings"]) == stages_timed and document["memory"] == {}
    (row,) = document["rows"]
    assert (row["mode"], row["seed"], row["samples"], row["frames"]) == (mode, 3, 52_920, 78)
    samples, rate = soundfile.read(name)
    assert (rate, samples.shape, soundfile.info(name).subtype) == (44_100, (52_920, 2), subtype)
    assert 0.01 < row["peak"] < 1 and np.abs(samples).max() == pytest.approx(1.0, abs=1e-4)
    with soundfile.SoundFile(name) as sound:
        about = json.loads(sound.copy_metadata()["comment"])
    assert (about["prompt"], about["seed"], about["precision"], about["mode"]) == ("warm pads", 3, "fp16mixed", mode)
    ids = {stage: manifest.identity(tiny_onnx / find_target(ENGINES[stage]).onnx[0]) for stage in stages}
    assert about["engines"] == ids and len(set(ids.values())) == len(stages)
    assert sorted(path.name for path in Path().iterdir()) == sorted(["tone.ogg", name])


def test_a_file_of_prompts_in_batches(base: list[object]) -> None:
    Path("rows.jsonl").write_text('{"prompt": "one"}\ntwo\n{"prompt": "three", "seconds": 4, "seed": 50}\n')
    argv = ["--prompts-file", "rows.jsonl", *base, "--quiet", "--batch", 2, "--out-dir", "d", "--format", "flac"]
    result = run(sa3_trt.main, argv)
    assert (result.code, result.err) == (0, "")
    outs = [row["out"] for row in json.loads(result.out)["rows"]]
    assert outs == ["d/001_one_3.flac", "d/002_two_4.flac", "d/003_three_50.flac"]
    assert [soundfile.info(out).frames for out in outs] == [52_920, 52_920, 176_400]
    titles = []
    for out in outs:
        with soundfile.SoundFile(out) as sound:
            titles.append(sound.title)
    assert titles == ["one", "two", "three"]
    # A row alone gives the same sound: the file name holds all that it depends on.
    alone = run(sa3_trt.main, ["--prompt", "two", *base, "--quiet", "--seed", 4, "--out", "two.flac"])
    assert alone.code == 0, alone.err
    first, second = (soundfile.read(name, dtype="int16")[0].astype(int) for name in (outs[1], "two.flac"))
    assert np.abs(first - second).max() <= 0.02 * np.abs(first).max()  # 16-bit products may round another way


def test_a_limiter_behind_a_decoder_that_clips_is_refused(base: list[object]) -> None:
    before = listing(Path())
    assert_user_error(
        run(sa3_trt.main, ["--prompt", "x", *base, "--quiet", "--out", "x.wav", "--peak", "limit"]), "--peak limit"
    )
    assert listing(Path()) == before
