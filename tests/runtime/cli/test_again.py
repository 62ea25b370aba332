"""--again regenerates a sound from the settings that its file stores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import sa3_trt
from helpers.commands import CommandResult, assert_user_error, run
from sa3_trt_core.audio import io as audio_io

MODES = {
    "text.wav": [],
    "guided.flac": ["--cfg", 3.5, "--apg", 0.25, "--negative-prompt", "voices"],
    "empty-negative.wav": ["--cfg", 2, "--negative-prompt="],
    "variation.wav": ["--init-audio", "tone.wav", "--init-start", 0.25, "--init-noise-level", 0.4],
    "other-order.ogg": ["--init-audio", "tone.wav", "--init-noise-level", 0.7, "--schedule-order", "scale-then-warp"],
    "in-painted.flac": ["--init-audio", "tone.wav", "--inpaint-range", "0.1,0.3", "--inpaint-range", "0.4,0.6",
                        "--paste-kept", "--init-noise-level", 0.8],
    "legacy.wav": ["--legacy-schedule", "--peak", "normalize", "--bits", "24"],
    "padded.wav": ["--duration-padding", 1.5, "--steps", 3],
}  # fmt: skip


@pytest.fixture
def machine_flags(tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Change to a folder with a sound; return the flags that depend on the machine, not on the sound."""
    soundfile.write(tmp_path / "tone.wav", 0.4 * np.sin(np.arange(44_100) / 20), 44_100)
    monkeypatch.chdir(tmp_path)
    return ["--onnx-root", tiny_onnx, "--backend", "onnxruntime"]


def made(machine_flags: list[object], *words: object) -> CommandResult:
    result = run(sa3_trt.main, [*words, *machine_flags, "--quiet"])
    assert result.code == 0, result.err
    return result


@pytest.mark.parametrize("name", MODES)
def test_the_same_sound_comes_of_its_metadata_alone(machine_flags: list[object], name: str) -> None:
    first = ["--prompt", "warm pads", "--seconds", 0.7, "--seed", 3, "--precision", "fp32", "--out", name]
    made(machine_flags, *first, *([] if "--steps" in MODES[name] else ["--steps", 2]), *MODES[name])
    Path("elsewhere").mkdir()
    made(machine_flags, "--again", name, "--out-dir", "elsewhere")
    (again,) = Path("elsewhere").iterdir()
    assert again.suffix == Path(name).suffix
    assert np.array_equal(soundfile.read(again)[0], soundfile.read(name)[0])
    assert audio_io.read_metadata(again) == audio_io.read_metadata(Path(name))


def test_flags_that_are_given_have_the_last_word(machine_flags: list[object]) -> None:
    made(machine_flags, "--prompt", "warm pads", "--seconds", 0.7, "--seed", 3, "--steps", 2, "--out", "a.flac",
         "--init-audio", "tone.wav", "--inpaint-range", "0.1,0.3", "--precision", "fp32")  # fmt: skip
    argv = ["--again", "a.flac", "--dry-run", "--json", *machine_flags]
    (row,) = json.loads(run(sa3_trt.main, argv).out)["rows"]
    assert (row["prompt"], row["seed"], row["seconds"], row["steps"]) == ("warm pads", 3, 0.7, 2)
    (row,) = json.loads(run(sa3_trt.main, [*argv, "--seed", "4", "--prompt", "bells", "--steps", "5"]).out)["rows"]
    assert (row["prompt"], row["seed"], row["seconds"], row["steps"]) == ("bells", 4, 0.7, 5)
    rows = json.loads(run(sa3_trt.main, [*argv, "--count", "3"]).out)["rows"]
    assert [row["seed"] for row in rows] == [3, 4, 5]


def test_another_format_leaves_away_the_resolution_that_it_has_not(machine_flags: list[object]) -> None:
    made(machine_flags, "--prompt", "a", "--seconds", 0.3, "--seed", 3, "--steps", 1, "--bits", "32f", "--out", "a.wav")
    for name in ("b.flac", "b.mp3", "b.wav"):
        made(machine_flags, "--again", "a.wav", "--out", name)
    subtypes = [soundfile.info(name).subtype for name in ("b.flac", "b.mp3", "b.wav")]
    assert subtypes == ["PCM_16", "MPEG_LAYER_III", "FLOAT"]


def test_the_original_is_not_overwritten(machine_flags: list[object]) -> None:
    made(machine_flags, "--prompt", "a", "--seconds", 0.3, "--seed", 3, "--steps", 1, "--precision", "fp32")
    before = Path("output/a_3.wav").read_bytes()
    made(machine_flags, "--again", "output/a_3.wav", "--steps", 2)
    assert Path("output/a_3.wav").read_bytes() == before and Path("output/a_3_again.wav").is_file()


@pytest.mark.parametrize(("about", "words"), [
    (None, "has no metadata of sa3_trt"),
    ({"prompt": 3}, "has no metadata of sa3_trt"),
    ({"prompt": "x", "seed": "9"}, "says that its seed is '9'"),
    ({"prompt": "x", "seed": -5}, "outside -1 to"),
    ({"prompt": "x", "steps": 2.5}, "not a whole number"),
    ({"prompt": "x", "inpaint": [1, 2]}, "says that its inpaint"),
    ({"prompt": "x", "lora": 5}, "says that its lora is 5"),
    ({"prompt": "x", "lora": [5]}, "says that its lora is 5"),
    ({"prompt": "x", "dit": "--out=stolen.wav"}, "invalid choice"),
    ({"prompt": "x" * 3000}, "were cut"),
])  # fmt: skip
def test_a_file_that_cannot_be_made_again_says_why(machine_flags: list[object], about: dict | None, words: str) -> None:
    if about is None:
        soundfile.write("a.wav", np.zeros(10), 44_100)
    else:
        audio_io.write_audio(Path("a.wav"), torch.zeros(10, 2), "16", about)
    assert_user_error(run(sa3_trt.main, ["--again", "a.wav", *machine_flags]), words)
    assert_user_error(run(sa3_trt.main, ["--again", "absent.wav", *machine_flags]), "absent.wav")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        sa3_trt.main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == "sa3_trt 0.1.0\n"
