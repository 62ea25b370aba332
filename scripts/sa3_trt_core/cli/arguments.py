"""Command-line plumbing: argument types, the parser of every command and its exit codes."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from sa3_trt_core.cli import streams
from sa3_trt_core.errors import ToolError, ToolWarning, as_flags, as_tool_error, memory_error

INTERRUPT_EXIT = 130

MAX_DIGITS = 4000
RESERVE = 4 << 20  # bytes, freed on out-of-memory so that the error can be printed
SHOWN_DIGITS = 40  # length of a refused value in a message
_DASHED = re.compile(r"argument ([^:]+): expected (?:one|at least one) argument")


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises ToolError. Abbreviations are off: a new flag would change their meaning."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]  # argparse's own signature, passed through

    def error(self, message: str) -> NoReturn:
        """Raise ToolError for a wrong command line; the hint for a value with a leading dash is FLAG=VALUE."""
        dashed = _DASHED.match(message)
        if dashed is not None:
            flag = dashed[1].split("/")[-1]
            raise ToolError(message, f"write a value that begins with a dash as {flag}=-value; see {self.prog} --help")
        raise ToolError(message, f"see {self.prog} --help")


def add_folder_flags(parser: argparse._ActionsContainer) -> None:
    """Add --onnx-root and --models-dir, the folders of a model's files."""
    parser.add_argument(
        "--onnx-root", type=Path, metavar="D", help="folder of ONNX files (default: $SA3_ONNX_DIR, else the hub)"
    )
    parser.add_argument(
        "--models-dir", type=Path, metavar="D", help="folder of engines (default: $SA3_MODELS_DIR, else models)"
    )


def folder_argv(args: argparse.Namespace) -> list[str]:
    """Return the flags of `add_folder_flags` that are set, as the argv of another command."""
    pairs = (("--onnx-root", args.onnx_root), ("--models-dir", args.models_dir))
    return [word for flag, folder in pairs if folder is not None for word in (flag, str(folder))]


def run_command(main: Callable[[], int]) -> int:
    """Return the exit code of `main`; print ToolErrors and errors of the system as two lines on stderr.

    Other exceptions keep their traceback. Closed standard streams and broken pipes do not stop a run.
    """
    streams.make_usable()
    reserve = bytearray(RESERVE)
    with warnings_shown():
        try:
            code = main()
            full = streams.lost_output()
            return code if full is None else _failed(as_tool_error(full) or ToolError(str(full), "free some space"))
        except ToolError as error:
            return _failed(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPT_EXIT
        except Exception as error:
            reserve.clear()
            known = as_tool_error(error)
            if known is None:
                raise
            code = _failed(known)
            if memory_error(error) is not None and streams.are_ours():
                # Exit handlers of libraries allocate memory too and would print their own tracebacks.
                sys.stderr.flush()
                os._exit(code)
            return code


def end_process(code: int) -> NoReturn:
    """End a command's process with an exit code, without the interpreter's teardown once PyTorch is loaded.

    Freeing models, graphs and modules of a GPU one by one takes 0.9 s (H100); with the process the driver frees all at
    once. Ray stops its workers in exit handlers, so these still run where it is loaded.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.modules.get("torch") and not sys.modules.get("ray"):
        os._exit(code)
    sys.exit(code)


def _failed(error: ToolError) -> int:
    print(error.lines(), file=sys.stderr)
    report = getattr(error, "report", None)
    if report:
        print(report, file=sys.stderr)
    return error.exit_code


@contextlib.contextmanager
def warnings_shown() -> Iterator[None]:
    """Print each ToolWarning that is issued in the block once, as a line on stderr; other warnings as before."""
    printed: set[str] = set()
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
            line: str | None = None,
        ) -> None:  # fmt: skip
            text = as_flags(" ".join(str(message).split()))
            if not issubclass(category, ToolWarning):
                before(message, category, filename, lineno, file, line)
            elif text not in printed:
                printed.add(text)
                print(f"warning: {text}", file=sys.stderr, flush=True)

        warnings.simplefilter("always", ToolWarning)
        warnings.showwarning = show
        yield


def number_type(low: float, high: float, unit: str = "") -> Callable[[str], float]:
    """Return an argparse `type=` for a finite number in [low, high]; `unit` is the word in the message ("seconds")."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(f"{_shown(text)!r} is not a number") from None
        if not math.isfinite(value) or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{_shown(text)} is outside {low:g} to {high:g}{_unit(unit)}")
        return value

    return convert


def integer_type(low: int, high: int, unit: str = "") -> Callable[[str], int]:
    """Return an argparse `type=` for a whole number in [low, high]."""

    def convert(text: str) -> int:
        digits = text.strip().lstrip("+-")
        if len(digits) > MAX_DIGITS and digits.isdecimal():  # int() refuses more than 4300 digits
            raise argparse.ArgumentTypeError(f"{_shown(text)} is outside {low} to {high}{_unit(unit)}")
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_shown(text)!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{_shown(text)} is outside {low} to {high}{_unit(unit)}")
        return value

    return convert


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_DIGITS else f"{text[:SHOWN_DIGITS]}..."


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""
