"""Errors of the user: two lines on stderr and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

USAGE_EXIT = 2
GATE_EXIT = 3


class ToolError(Exception):
    """An error that the user can fix: `message` states the problem, `hint` the remedy."""

    def __init__(self, message: str, hint: str, exit_code: int = USAGE_EXIT) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        """Return the pickle recipe: the arguments differ from the base class's single message."""
        return type(self), (self.message, self.hint, self.exit_code)

    def lines(self) -> str:
        """Return message and hint as two lines; newlines in a library's message are removed.

        Names of arguments become flags of the command line.
        """
        return as_flags(f"error: {_one_line(self.message)}\n  hint: {_one_line(self.hint)}")


class InvalidRequest(ToolError, ValueError):
    """A wrong argument of the Python interface; its message names the argument."""


class ToolWarning(UserWarning):
    """A degradation that does not stop a run; commands print it as one line on stderr."""


class GateError(ToolError):
    """A failed check of a result: exit code 3; `report`, if any, is printed after the two lines."""

    def __init__(self, message: str, hint: str, report: str | None = None) -> None:
        super().__init__(message, hint, GATE_EXIT)
        self.report = report

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message, self.hint, self.report)


_ARGUMENT = re.compile(r"`([a-z][a-z_]*)(?:=([^`]*))?`")
_FLAGS = {"inpaint": "inpaint-range"}  # arguments whose flag has another name


def as_flags(text: str) -> str:
    """Return a message whose arguments, `name` or `name=value`, are flags of the command line: --name value."""

    def flag(match: re.Match[str]) -> str:
        name, value = match.groups()
        return f"--{_FLAGS.get(name, name.replace('_', '-'))}{f' {value}' if value else ''}"

    return _ARGUMENT.sub(flag, text)


def _one_line(text: str) -> str:
    return " ".join(str(text).split())


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # NumPy's message for a full disk
# Out-of-memory messages of torch, ONNX Runtime, CUDA, safetensors and the dynamic linker.
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|failed to allocate memory|unable to allocate|bad[ _]alloc"
    r"|out of memory|std::bad_array_new_length|AllocateRawInternal|_ALLOC_FAILED|can't start new thread"
    r"|pthread_create failed|failed to map segment|memory allocation of \d+ bytes|memory exhausted",
    re.IGNORECASE,
)
_AMOUNT = re.compile(
    r"(?:allocate|requested buffer of size|allocation of|mmap|requested bytes of)[: ]+([\d.]+ ?(?:[KMGT]?i?B\b)?)",
    re.IGNORECASE,
)
_LESS = "free some, or ask for less: a shorter length, fewer rows at a time, `free_models` or `chunk_frames=64`"


def as_tool_error(error: BaseException) -> ToolError | None:
    """Return the ToolError of a system error: out of memory, disk full, invalid path or text; None for other errors.

    Libraries wrap such errors or reword them, so causes and messages are inspected too.
    """
    for one in _chain(error):
        if isinstance(one, ToolError):
            return one
        translated = memory_error(one) or _disk_error(one) or _path_error(one)
        if translated is not None:
            return translated
    return None


def memory_error(error: BaseException, doing: str = "") -> ToolError | None:
    """Return the ToolError of an out-of-memory error, with the requested size; None for other errors."""
    words = str(error)
    system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (isinstance(error, MemoryError) or system or _NO_MEMORY.search(words)):
        return None
    amount = _AMOUNT.search(words)
    size = "" if amount is None else _size(amount[1])
    asked = f" (requested: {size})" if size else ""
    return ToolError(f"out of memory{f' while {doing}' if doing else ''}{asked}", _LESS)


def _size(text: str) -> str:
    text = text.strip().rstrip(".")
    return f"{int(text) / 1e6:,.1f} MB" if text.isdigit() else text


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    step: BaseException | None = error
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        yield step
        step = step.__cause__ or step.__context__


def _disk_error(error: BaseException) -> ToolError | None:
    words = str(error)
    by_number = isinstance(error, OSError) and error.errno in _NO_ROOM
    by_words = any(os.strerror(number) in words or f"os error {number})" in words for number in _NO_ROOM)
    if not (by_number or by_words or _CUT_SHORT.fullmatch(words)):
        return None
    return ToolError(f"disk full: {words}", "free some space and run the same command again")


def _path_error(error: BaseException) -> ToolError | None:
    """Return the ToolError of a path that the system rejects, or of text that is not Unicode."""
    if isinstance(error, UnicodeError):
        text = getattr(error, "object", "")
        shown = ascii(text if isinstance(text, str) else bytes(text))[:80]
        return ToolError(f"{shown} holds characters that cannot be encoded", "write it in UTF-8, or rename the file")
    if isinstance(error, ValueError) and "null byte" in str(error):
        return ToolError("a path holds a null character", "give the path of a file")
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in _CURES):
        return None
    if error.filename is None or error.errno is None:
        return ToolError(f"the system refuses: {error}", _CURES.get(error.errno or 0, "give another path"))
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    shown = name if len(name) <= _MAX_SHOWN_LENGTH else f"{name[:_MAX_SHOWN_LENGTH]}..."
    return ToolError(f"cannot use {shown}: {error.strerror or error}", _CURES.get(error.errno, "give another path"))


_MAX_SHOWN_LENGTH = 120
_CURES = {
    errno.EACCES: "give a path that you may read and write, or change its permissions",
    errno.EPERM: "give a path that you may read and write, or change its permissions",
    errno.ENAMETOOLONG: "give a path whose names have at most 255 bytes each",
    errno.ELOOP: "its symbolic links lead in a circle: give another path",
    errno.ENOENT: "give a path that exists, and run the command again",
}
