"""One process at a time: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sa3_trt_core.errors import ToolError


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` (made if need be) while the block runs; another holder is told of and waited for.

    The kernel drops the lock when its process dies, kill -9 included, so that there are no stale ones. Folders that
    were made for the file go with it when they are empty. Raises ToolError if the file cannot be made.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    file = _locked(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: whoever waits sees that its file is gone, and opens anew
        file.close()
        with contextlib.suppress(OSError):  # not empty, or somebody else's by now
            for folder in made:
                folder.rmdir()


def lock_path(artefact: Path) -> Path:
    """Where the lock of an artefact lies: hidden, beside it."""
    return artefact.with_name(f".{artefact.name}.lock")


def _locked(path: Path, what: str) -> IO[bytes]:
    told = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except OSError as error:
            raise ToolError(
                f"cannot lock {path}: {error.strerror or error}", "choose a folder that can be written"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not told:
                print(f"waiting: another run holds {what}", file=sys.stderr, flush=True)
            told = True
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return file  # a file system without locks: as good as before there was one
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
