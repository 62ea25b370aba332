"""File locks between processes, released by the kernel when their process ends."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from filelock import FileLock

NO_LOCKS = (
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.EINVAL,
)  # a file system without locks: continue without one


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` during the block; print a notice while waiting for another process.

    The kernel releases the lock when its process dies, also by kill -9, so locks are never stale. Folders created for
    the file are removed with it if empty. Raises ToolError if the file cannot be created.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    lock = _acquired(path, what)
    try:
        yield
    finally:
        path.unlink(
            missing_ok=True
        )  # before the release: a waiting process sees that the file is gone, and opens a new one
        lock.release()
        with contextlib.suppress(OSError):  # not empty, or taken by another process meanwhile
            for folder in made:
                folder.rmdir()


def lock_path(artefact: Path) -> Path:
    """Return the path of an artefact's lock: a hidden file beside it."""
    return artefact.with_name(f".{artefact.name}.lock")


def _acquired(path: Path, what: str) -> FileLock:
    from filelock import FileLock, Timeout

    lock, wait = FileLock(path, fallback_to_soft=False), 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the previous owner removed the folder: make it again
                lock.acquire(timeout=wait)
                return lock
        except Timeout:
            print(f"waiting: another run holds {what}", file=sys.stderr, flush=True)
            wait = -1
        except OSError as error:
            if error.errno in NO_LOCKS:
                return lock
            reason = error.strerror or str(error)
            raise ToolError(f"cannot lock {path}: {reason}", "choose a folder that can be written") from None
