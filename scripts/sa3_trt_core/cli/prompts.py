"""Read prompt files with per-row settings, and name the output files."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_trt_core import shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.errors import ToolError
from sa3_trt_core.request import MAX_SEED, require_text, shown

MAX_FILE = 16 << 20  # bytes
STANDARD_INPUT = "-"
MAX_DIGITS = 400
MAX_SLUG_LENGTH = 48
DIGEST_LETTERS = 8
_SPACE = "\ufeff \t\r\v\f"  # unlike str.strip(), keeps U+0085 and similar at the ends of a prompt
_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "seed": (int,), "seconds": (int, float), "negative_prompt": (str,)
}  # fmt: skip
_RANGES = {"seed": (0, MAX_SEED), "seconds": (shapes.MIN_SECONDS, shapes.MAX_SECONDS)}


@dataclass(frozen=True)
class PromptRow:
    """A prompt and its own settings; None means the setting of the command line."""

    prompt: str
    seed: int | None = None
    seconds: float | None = None
    negative_prompt: str | None = None


def read_prompts(path: Path) -> list[PromptRow]:
    """Return the rows of a prompts file: one prompt or JSON object per line; empty lines are skipped.

    A line ends at \\n or \\r\\n only: a prompt may contain other separators of Unicode. A byte order mark at the
    start of any line, as in concatenated files, is dropped. An object has "prompt" and may have "seed",
    "seconds" and "negative_prompt". The path "-" is standard input. Raises ToolError naming the line.
    """
    name = str(path)
    try:
        if name == STANDARD_INPUT:
            name = "standard input"
            text = files.text_of(_standard_input(), name, MAX_FILE)
        else:
            text = files.read_text(path, MAX_FILE)
    except ToolError as error:
        raise ToolError(f"--prompts-file: {error.message}", "give a text file in UTF-8, one prompt per line") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(number, line.strip(_SPACE)) for number, line in enumerate(lines, 1) if line.strip(_SPACE)]
    rows = []
    for number, line in numbered:
        row = _object(name, number, line) if line.startswith("{") else PromptRow(line)
        for said in (row.prompt, row.negative_prompt):
            if said is not None:
                require_text(said, f"{name} line {number}")
        rows.append(row)
    if not rows:
        raise ToolError(f"{name} contains no prompt", "write one prompt per line")
    return rows


def _object(name: str, number: int, line: str) -> PromptRow:
    hint = f"a line is text, or a JSON object of {', '.join(_KINDS)}"
    try:
        fields: Any = json.loads(line, parse_int=_whole_number)
    except (ValueError, RecursionError):
        raise ToolError(f"{name} line {number} begins with {{ and is not JSON", hint) from None
    unknown = sorted(fields.keys() - _KINDS.keys())
    if unknown or "prompt" not in fields:
        wrong = f"has {unknown[0]!a:.60}" if unknown else "has no 'prompt'"
        raise ToolError(f"{name} line {number} {wrong}", hint)
    for key, value in fields.items():
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            raise ToolError(f"{name} line {number}: {key} is {shown(value)}", hint)
        if key in _RANGES:
            low, high = _RANGES[key]
            if isinstance(value, int | float) and not low <= value <= high:
                raise ToolError(f"{name} line {number}: {key} {shown(value)} is outside {low:g} to {high:g}", hint)
    return PromptRow(**fields)


def _whole_number(digits: str) -> int:
    """Parse an integer of JSON, truncated to more digits than any range has: int() refuses more than 4300."""
    return int(digits[:MAX_DIGITS])


def _standard_input() -> bytes:
    """Return standard input as bytes; empty if it is closed. Raises ToolError."""
    buffer = getattr(sys.stdin, "buffer", None)
    try:
        return b"" if buffer is None else bytes(buffer.read(MAX_FILE + 1))
    except (OSError, ValueError) as error:
        raise ToolError(f"cannot read standard input: {error}", "pipe the prompts in, or name a file") from None


def slug(prompt: str) -> str:
    """Return the prompt as a file name: ASCII letters, digits and dashes.

    A digest replaces truncated or non-ASCII text, so that different prompts have different names.
    """
    plain = unicodedata.normalize("NFKD", prompt.lower())
    letters = "".join(letter for letter in plain if not unicodedata.combining(letter))
    whole = re.sub(r"[^a-z0-9]+", "-", letters).strip("-")
    name = whole[:MAX_SLUG_LENGTH].strip("-")
    foreign = any(letter.isalnum() and not letter.isascii() for letter in letters)
    if name == whole and not foreign and (name or not prompt.strip()):
        return name or "untitled"
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_LETTERS]
    return f"{name[: MAX_SLUG_LENGTH - DIGEST_LETTERS - 1].strip('-') or 'prompt'}-{digest}"


def out_paths(prompts: Sequence[tuple[str, int]], folder: Path, suffix: str) -> list[Path]:
    """Return the output paths of (prompt, seed) rows: <prompt>_<seed>, numbered if there are several."""
    digits = max(3, len(str(len(prompts))))
    numbers = [f"{number:0{digits}d}_" if len(prompts) > 1 else "" for number in range(1, len(prompts) + 1)]
    return [
        folder / f"{number}{slug(prompt)}_{seed}{suffix}"
        for number, (prompt, seed) in zip(numbers, prompts, strict=True)
    ]
