"""Make standard streams safe: closed ones, broken pipes, and characters outside their encoding do not stop a run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import IO, Any

STDIN, STDOUT, STDERR = 0, 1, 2
_NO_READER = (errno.EPIPE, errno.EBADF, errno.EIO, errno.ENXIO, errno.ECONNRESET)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Output(io.FileIO):
    """Raw output stream on a descriptor; output to a broken pipe is dropped without an error.

    `full` is the disk-full error of a file, reported at the end of the run: the sounds are worth more than the
    table about them.
    """

    full: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`; wait for a non-blocking pipe."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                written = super().write(view[done:])
            except OSError as error:
                if error.errno not in (*_NO_READER, *FULL):
                    raise
                if error.errno in FULL:
                    self.full = error
                return len(view)
            if written is None:
                select.select([], [self.fileno()], [])
            done += written or 0
        return len(view)


def make_usable() -> None:
    """Replace closed or unsafe standard streams of this process.

    A closed descriptor is opened on the null device first: the next file that is opened would get its number, and what
    a library prints would be written into that file. Streams that were replaced by other objects are left alone.
    """
    for number in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # os.open returns the lowest free descriptor: this one
    if sys.stdin is None:
        raw = io.BufferedReader(io.FileIO(STDIN, closefd=False))
        sys.stdin = io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape")
    elif sys.stdin is sys.__stdin__:
        with contextlib.suppress(AttributeError, ValueError):
            sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    sys.stdout = _tolerant(sys.stdout, sys.__stdout__, STDOUT)
    sys.stderr = _tolerant(sys.stderr, sys.__stderr__, STDERR)


def are_ours() -> bool:
    """Return True if standard error comes from `make_usable`: in a command's process, not in a test."""
    return isinstance(getattr(getattr(sys.stderr, "buffer", None), "raw", None), _Output)


def lost_output() -> OSError | None:
    """Flush standard output; return the disk-full error, None without one."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.full if isinstance(raw, _Output) else None


def _tolerant(stream: IO[str] | None, original: IO[str] | None, number: int) -> Any:
    """Return `stream` rebuilt on an _Output, or `stream` itself if it is not the interpreter's own."""
    if stream is not None and (stream is not original or not isinstance(stream, io.TextIOWrapper)):
        return stream
    if stream is not None:
        if isinstance(getattr(stream.buffer, "raw", None), _Output):
            return stream
        with contextlib.suppress(OSError):
            stream.flush()
    encoding = stream.encoding if stream is not None else "utf-8"
    raw = _Output(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace",
        line_buffering=number == STDERR or raw.isatty(),
    )  # fmt: skip
