"""Standard streams that are closed, full or unread: the sound is still written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from helpers.commands import ROOT
from sa3_trt_core.cli import streams

COMMAND = [sys.executable, str(ROOT / "scripts/sa3_trt.py")]
SHORT = ["--seconds", "0.3", "--steps", "1", "--seed", "1", "--precision", "fp32", "--backend", "onnxruntime"]

TAILS = [(">&- 2>&-", 0), ("<&- | true; exit ${PIPESTATUS[0]}", 0), (">/dev/full", 2)]


def shell(line: list[str], tail: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = ["bash", "-c", f'"$@" {tail}', "bash", *line]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", check=False, env=env,
                          timeout=120)  # fmt: skip


@pytest.mark.parametrize(("tail", "code"), TAILS)
def test_the_sound_is_written(tiny_onnx: Path, tmp_path: Path, tail: str, code: int) -> None:
    result = shell([*COMMAND, *SHORT, "--prompt", "x", "--onnx-root", str(tiny_onnx), "--out", "a.wav"], tail, tmp_path)
    assert (
        result.returncode == code and "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    ), result
    assert soundfile.info(tmp_path / "a.wav").frames == 13_230
    assert code == 0 or ("error: disk full" in result.stderr and "hint: " in result.stderr)


@pytest.mark.parametrize("tail", ["<&-", "</dev/null", "<&- >&-"])
def test_a_prompt_that_cannot_be_asked_for_is_two_lines(tmp_path: Path, tail: str) -> None:
    result = shell([*COMMAND, "--dry-run"], tail, tmp_path)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 2, result
    assert "no prompt, and standard input is not a terminal" in result.stderr and "--prompt" in result.stderr


def test_the_menu_lists_where_nobody_can_answer(tmp_path: Path) -> None:
    result = shell([sys.executable, str(ROOT / "build/build.py"), "--models-dir", "m"], "<&-", tmp_path)
    assert result.returncode == 0 and "t5gemma" in result.stdout and result.stderr == ""


def test_a_file_opened_later_does_not_become_a_closed_stream(tmp_path: Path) -> None:
    """With descriptor 1 closed, the next open() gets it; library output must not go into that file."""
    code = (
        "import os, sys; from sa3_trt_core.cli.arguments import run_command\n"
        "def main():\n"
        "    with open('made.txt', 'w') as file:\n"
        "        file.write('mine'); os.write(1, b'noise'); os.write(2, b'noise'); print('text')\n"
        "    return 0\n"
        "sys.exit(run_command(main))"
    )
    result = shell([sys.executable, "-c", code], "<&- >&- 2>&-", tmp_path)
    assert result.returncode == 0 and (tmp_path / "made.txt").read_text() == "mine"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_names_outside_the_encoding_of_a_stream(tmp_path: Path, encoding: str) -> None:
    argv = [*COMMAND, "--prompt", "x", "--seed", "1", "--dry-run", "--out", "klavier-ü-音-\udce9.wav"]
    result = shell([os.fsencode(word) for word in argv], "", tmp_path, PYTHONIOENCODING=encoding)  # type: ignore[misc]
    assert result.returncode == 0 and result.stderr == "", result
    assert "klavier-" in result.stdout and r"\udce9.wav" in result.stdout
    plan = json.loads(shell([*map(os.fsencode, argv), "--json"], "", tmp_path, PYTHONIOENCODING=encoding).stdout)
    assert plan["rows"][0]["out"] == "klavier-ü-音-\udce9.wav"


def test_a_slow_reader_is_waited_for() -> None:
    """A non-blocking pipe, as Node.js opens one, accepts 64 kB at a time."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    data = bytes(range(256)) * 2000
    slow = "import sys, time; time.sleep(.3); print(len(sys.stdin.buffer.read()))"
    child = subprocess.Popen([sys.executable, "-c", slow], stdin=reading, stdout=subprocess.PIPE)
    os.close(reading)
    assert streams._Output(writing, "wb", closefd=False).write(data) == len(data)
    os.close(writing)
    assert int(child.communicate(timeout=30)[0]) == len(data)


def test_other_errors_of_a_stream_are_not_hidden() -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        output = streams._Output(full.fileno(), "wb", closefd=False)
        assert output.write(b"x") == 1 and output.full is not None
    with pytest.raises((ValueError, io.UnsupportedOperation)):
        streams._Output(os.open(os.devnull, os.O_RDONLY), "rb").write(b"x")
