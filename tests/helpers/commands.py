"""Run a command in this process and capture everything that it prints."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from sa3_trt_core.cli.arguments import run_command

ROOT = Path(__file__).resolve().parents[2]


class CommandResult(NamedTuple):
    """The result of a command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def run(main: Callable[[list[str]], int], argv: Sequence[object]) -> CommandResult:
    """Call `main` through `run_command`. Libraries that write to the descriptors themselves are captured too."""
    with _redirected("stdout") as out, _redirected("stderr") as err:
        code = run_command(lambda: main([str(word) for word in argv]))
    with out, err:
        return CommandResult(code, _read_back(out), _read_back(err))


def kill_when(argv: Sequence[str], ready: Callable[[], bool], seconds: float = 180.0) -> None:
    """Start a command in a process of its own and kill -9 it as soon as `ready` holds; it must not end before."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None and not ready():
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the command ended before it could be killed"


def assert_user_error(result: CommandResult, *words: str) -> None:
    """Assert a user error: exit 2, empty stdout, two lines on stderr, the first of which contains all of `words`."""
    assert (result.code, result.out) == (2, ""), result
    lines = result.err.splitlines()
    assert len(lines) == 2, result.err
    assert lines[0].startswith("error: ") and lines[1].startswith("  hint: "), result.err
    for word in words:
        assert word in lines[0], f"{word!r} is not named: {lines[0]}"


def listing(folder: Path) -> dict[str, str]:
    """Return a digest of every file under a folder, hidden ones too: equal listings mean an unchanged folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def listing_without_checks(folder: Path) -> dict[str, str]:
    """Return a folder's listing without the records of passed check rows, which loading an engine writes."""
    return {name: digest for name, digest in listing(folder).items() if not name.endswith(".checked.json")}


@contextlib.contextmanager
def _redirected(name: str) -> Iterator[IO[str]]:
    """Redirect one standard stream to a temporary file, for Python code and for code that writes to the descriptor."""
    file = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # read after the block
    descriptor = {"stdout": 1, "stderr": 2}[name]
    kept_stream, kept = getattr(sys, name), os.dup(descriptor)
    kept_stream.flush()
    os.dup2(file.fileno(), descriptor)
    setattr(sys, name, file)
    try:
        yield file
    finally:
        file.flush()
        setattr(sys, name, kept_stream)
        os.dup2(kept, descriptor)
        os.close(kept)


def _read_back(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
