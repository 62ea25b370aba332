"""Atomic writes, checks of output paths before any work, and digests of large files."""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sa3_trt_core.errors import ToolError

CHUNK = 1 << 20
SAMPLES, SAMPLE_BYTES = 256, 4096  # blocks of a sampled digest, and their size in bytes
MAX_NAME_LENGTH = 255  # bytes, on every common file system


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block succeeds, else remove it.

    A killed run leaves the old file or none. The suffix is kept, because writers such as numpy append a missing one.
    The folder is created if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / _temporary_name(path, secrets.token_hex(6))
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of killed runs of `atomic_path`. Requires that the caller holds the lock of `path`."""
    for old in path.parent.glob(glob.escape(_temporary_name(path, "*")).replace("[*]", "[0-9a-f]" * 12)):
        old.unlink(missing_ok=True)


def write_atomic_bytes(path: Path, data: bytes) -> None:
    """Write a whole file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_atomic_text(path: Path, text: str) -> None:
    """Write a whole text file in UTF-8, atomically."""
    write_atomic_bytes(path, text.encode("utf-8"))


def replace_folder(finished: Path, target: Path) -> None:
    """Replace a folder by a finished one; the old one is removed only after the new one is in place."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    finished.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def read_text(path: Path, largest: int) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises ToolError for a file that cannot be read, is larger than `largest` bytes, or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except OSError as error:
        raise ToolError(f"cannot read {path}: {error.strerror or error}", "give the path of a text file") from None
    return text_of(data, str(path), largest)


def text_of(data: bytes, name: str, largest: int) -> str:
    """Return the bytes of a text file as `read_text` does; errors call it `name`. Raises ToolError."""
    if len(data) > largest:
        raise ToolError(f"{name} is larger than {largest} bytes", "split it, or give the right file")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ToolError(f"{name} is UTF-16, not UTF-8 text", "save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"{name} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}"
        raise ToolError(wrong, "give a text file in UTF-8") from None


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sampled_digest(path: Path) -> str:
    """Return the sha256 of SAMPLES blocks spread over a file, including first and last; of all of a small file.

    Takes milliseconds, and detects replaced files of equal size and mtime, but not a change between two blocks.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    step = max((size - SAMPLE_BYTES) / (SAMPLES - 1), SAMPLE_BYTES)
    with path.open("rb") as file:
        for index in range(SAMPLES):
            file.seek(round(index * step))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def require_writable(path: Path, what: str) -> None:
    """Raise ToolError for a destination that cannot be written, before any work; creates nothing.

    A missing folder is accepted if its nearest existing ancestor is a writable folder. This is tested with an unnamed
    temporary file: permission bits do not apply to root, and do not cover /proc or a read-only disk.
    """
    hint = f"choose another {what}"
    if len(os.fsencode(path.name)) > MAX_NAME_LENGTH:
        raise ToolError(f"cannot write {what}: its file name is longer than {MAX_NAME_LENGTH} bytes", hint)
    if path.is_dir():
        raise ToolError(f"cannot write {what} {path}: it is a folder", hint)
    if os.path.lexists(path) and path.exists() and not path.is_file():
        raise ToolError(f"cannot write {what} {path}: it is not a regular file", hint)
    ancestor = path.parent
    while not os.path.lexists(ancestor) and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise ToolError(f"cannot write {what} {path}: {ancestor} is not a folder", hint)
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise ToolError(f"cannot write {what} {path}: {ancestor} is not writable ({reason})", hint) from None


def _temporary_name(path: Path, key: str) -> str:
    return f".{path.stem[:32]}.{key}.tmp{path.suffix[-32:]}"


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
