"""One process at a time: a lock that ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from sa3_trt_core.errors import ToolError


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` (made if need be) while the block runs; another holder is told of and waited for.

    The kernel drops the lock when its process dies, kill -9 included, so that there are no stale ones. The file itself
    stays: were it removed, a third process could lock a new file of that name while the second holds the old one.
    Raises ToolError if the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ToolError(
            f"cannot lock {path}: {error.strerror or error}", "choose a folder that can be written"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting: another run holds {what}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: as good as before there was one
        yield


def lock_path(artefact: Path) -> Path:
    """Where the lock of an artefact lies: hidden, beside it."""
    return artefact.with_name(f".{artefact.name}.lock")
