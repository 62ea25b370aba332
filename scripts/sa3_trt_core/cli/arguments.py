"""Command-line plumbing: argument types, the parser of every command and its exit codes."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from sa3_trt_core.errors import ToolError

INTERRUPT_EXIT = 130

_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # NumPy's words for it

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are ToolErrors; abbreviations are off, because a new flag would change their meaning."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # argparse's own signature, passed through

    def error(self, message: str) -> NoReturn:
        raise ToolError(message, f"see {self.prog} --help")


def run_command(main: Callable[[], int]) -> int:
    """The exit code of `main`, its ToolErrors as two lines on stderr; anything unforeseen keeps its traceback."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except ToolError as error:
        print(error.lines(), file=sys.stderr)
        report = getattr(error, "report", None)
        if report:
            print(report, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPT_EXIT
    except BrokenPipeError:
        # The reader of our output has gone. Without this, the interpreter complains once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if not _disk_is_full(error):
            raise
        told = ToolError(f"the disk takes no more: {error}", "free some space and run the same command again")
        print(told.lines(), file=sys.stderr)
        return told.exit_code


def number_type(low: float, high: float, unit: str = "") -> Callable[[str], float]:
    """An argparse `type=` for a finite number in [low, high]; `unit` is the word in the message ("seconds")."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not math.isfinite(value) or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is outside {low:g} to {high:g}{_unit(unit)}")
        return value

    return convert


def integer_type(low: int, high: int, unit: str = "") -> Callable[[str], int]:
    """An argparse `type=` for a whole number in [low, high]."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is outside {low} to {high}{_unit(unit)}")
        return value

    return convert


def _disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room, or what caused the error did; libraries say it in words of their own."""
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return True
    words = str(error)
    if _CUT_SHORT.fullmatch(words) or any(
        os.strerror(number) in words or f"os error {number})" in words for number in _NO_ROOM
    ):
        return True
    before = error.__cause__ or error.__context__
    return before is not None and _disk_is_full(before)


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""
