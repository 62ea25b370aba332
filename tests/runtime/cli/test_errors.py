"""User errors exit with 2 and two lines; the command starts without heavy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import sa3_trt
from sa3_trt_core import console
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.errors import GateError, ToolError

SCRIPTS = Path(sa3_trt.__file__).parent


def failing(error: BaseException):  # type: ignore[no-untyped-def]
    def main() -> int:
        raise error

    return main


def two_lines(text: str) -> list[str]:
    lines = text.splitlines()
    assert len(lines) == 2, text
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  hint: ")
    return lines


def test_a_users_mistake_is_two_lines_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(ToolError("first\nsecond", "do\n  this"))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert two_lines(err) == ["error: first second", "  hint: do this"]


def test_a_gate_is_exit_3_with_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(GateError("too far", "look", report="sigma 1.0\nsigma 0.9"))) == 3
    lines = capsys.readouterr().err.splitlines()
    two_lines("\n".join(lines[:2]))
    assert lines[2:] == ["sigma 1.0", "sigma 0.9"]


def test_an_interrupt_is_one_line_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_own_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(failing(ZeroDivisionError()))


def test_a_closed_pipe_is_quiet() -> None:
    code = "from sa3_trt_core.cli.arguments import run_command\nrun_command(lambda: print('x' * 10_000_000) or 0)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_bad_flags_and_values_are_tool_errors() -> None:
    parser = Parser(prog="p")
    parser.add_argument("--x", type=number_type(0.5, 10, "seconds"))
    parser.add_argument("--many", type=integer_type(1, 8))
    assert parser.parse_args(["--x", "1e0", "--many", "8"]).x == 1.0
    for bad in (
        ["--x", "nan"],
        ["--x", "inf"],
        ["--x", "0"],
        ["--x", "x"],
        ["--many", "1.5"],
        ["--many", "9"],
        ["--man", "3"],
    ):
        with pytest.raises(ToolError) as caught:
            parser.parse_args(bad)
        assert caught.value.hint == "see p --help"
        assert caught.value.exit_code == 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("SA3_ONNX_DIR", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds", "0"], "0.01 to 380.43 seconds"),
        (["--seconds", "-1"], "0.01 to 380.43 seconds"),
        (["--seconds", "1e9"], "0.01 to 380.43 seconds"),
        (["--seconds", "nan"], "0.01 to 380.43 seconds"),
        (["--seconds", "abc"], "not a number"),
        (["--steps", "0"], "outside 1 to"),
        (["--seed", "-2"], "outside -1 to"),
        (["--dit", "sm-music", "--precision", "fp8"], "has no fp8 engine"),
        (["--precision", "int4"], "invalid choice"),
        (["--backend", "torch", "--precision", "fp32"], "fp16mixed and fp8"),
        (["--out", "/proc/x.wav"], "cannot write --out"),
        (["--out", "x.aac"], "does not end in .wav, .flac"),
        (["--save-latents", "/proc/x.npz"], "cannot write --save-latents"),
        (["--onnx-root", "absent"], "no such ONNX folder"),
        (["--onnx-root", "."], "tokenizer.json"),
        (["--unknown"], "unrecognized"),
        (["--precision", "fp8", "--onnx-root", "."], "no sa3-m/dit_fp8.onnx under ."),
    ],
)
def test_the_commands_bad_input(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run_command(lambda: sa3_trt.main(["--prompt", "x", *arguments])) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in two_lines(err)[0]
    assert os.listdir(folder) == []


def test_the_plan_is_shown_without_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "Sad Säge, 90 BPM", "--precision", "fp8", "--backend", "onnxruntime", "--seconds", "54"]
    assert sa3_trt.main([*arguments, "--seed", "7", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["target"] for stage in plan["stages"]] == ["t5gemma", "sa3-m-fp8", "same-l-decoder"]
    (row,) = plan["rows"]
    assert (row["frames"], row["out"]) == (646, "output/sad-sage-90-bpm_7.wav")
    assert sa3_trt.main(["--prompt", "", "--dry-run", "--seed", "1"]) == 0  # an empty prompt is allowed
    assert "output/untitled_1.wav" in capsys.readouterr().out
    assert os.listdir(folder) == []


def test_help_needs_no_package() -> None:
    command = [sys.executable, "-S", str(SCRIPTS / "sa3_trt.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert "--save-latents" in result.stdout


def test_wav_is_16_bit_and_atomic(tmp_path: Path) -> None:
    pcm = np.array([[0, 1], [32767, -32767], [-5, 5]], dtype=np.int16)
    audio_io.write_wav_16(tmp_path / "new" / "a.wav", pcm, 44_100)
    info = soundfile.info(tmp_path / "new" / "a.wav")
    assert (info.subtype, info.samplerate, info.channels, info.frames) == ("PCM_16", 44_100, 2, 3)
    assert np.array_equal(soundfile.read(tmp_path / "new" / "a.wav", dtype="int16")[0], pcm)
    assert os.listdir(tmp_path / "new") == ["a.wav"]
    with pytest.raises(ValueError, match="16-bit samples"):
        audio_io.write_wav_16(tmp_path / "b.wav", pcm.astype(np.float32))


def test_progress_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("sample", 4, "steps") as progress:
        for _ in range(4):
            progress.advance(note="sigma 0.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sample: 4/4 steps 100%")
    assert err.count("\n") == 1
    with console.Progress("sample", 1, quiet=True) as progress:
        progress.advance()
    assert capsys.readouterr().err == ""


def test_numbers_and_tables() -> None:
    assert [console.format_bytes(n) for n in (0, 999, 1000, 999_999, 2_900_000_000)] == [
        "0 B", "999 B", "1.0 kB", "1.0 MB", "2.9 GB",
    ]  # fmt: skip
    assert [console.format_seconds(s) for s in (0.4, 12.34, 59.99, 185, 7620)] == [
        "0.40 s", "12.3 s", "1 min 00 s", "3 min 05 s", "2 h 07 min",
    ]  # fmt: skip
    assert console.table(["stage", "s"], [["load", "1.50"], ["decode", "12.00"]]).splitlines() == [
        "stage       s",
        "------  -----",
        "load     1.50",
        "decode  12.00",
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SCRIPTS)}
