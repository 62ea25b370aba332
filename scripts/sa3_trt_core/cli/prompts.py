"""Many prompts: files of them, what each row says for itself, and the names of the sounds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_trt_core.errors import ToolError

LARGEST_FILE = 16 << 20  # bytes
LONGEST_SLUG = 48
_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,), "seed": (int,), "seconds": (int, float), "negative_prompt": (str,)
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A prompt and what it says for itself; None leaves it to the command line."""

    prompt: str
    seed: int | None = None
    seconds: float | None = None
    negative_prompt: str | None = None


def read_prompts(path: Path) -> list[Row]:
    """The rows of a prompts file: one prompt a line, or a JSON object a line; empty lines are skipped.

    An object has "prompt" and may have "seed", "seconds" and "negative_prompt". Raises ToolError naming the line.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ToolError(f"{path} is larger than {LARGEST_FILE} bytes", "split the prompts file")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ToolError(f"cannot read --prompts-file {path}: {reason}", "give a text file, one prompt a line") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    rows = [_object(path, number, line) if line.startswith("{") else Row(line) for number, line in numbered]
    if not rows:
        raise ToolError(f"{path} has no prompt in it", "write one prompt a line")
    return rows


def _object(path: Path, number: int, line: str) -> Row:
    hint = f"a line is text, or a JSON object of {', '.join(_KINDS)}"
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ToolError(f"{path} line {number} begins with {{ and is not JSON", hint) from None
    unknown = sorted(found.keys() - _KINDS.keys())
    if unknown or "prompt" not in found:
        wrong = f"has {unknown[0]!r}" if unknown else "has no 'prompt'"
        raise ToolError(f"{path} line {number} {wrong}", hint)
    for key, value in found.items():
        if not isinstance(value, _KINDS[key]) or isinstance(value, bool):
            raise ToolError(f"{path} line {number}: {key} is {value!r}", hint)
    return Row(**found)


def slug(prompt: str) -> str:
    """The prompt as a file name: ASCII letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:LONGEST_SLUG].strip("-") or "untitled"


def out_paths(prompts: Sequence[tuple[str, int]], folder: Path, suffix: str) -> list[Path]:
    """Where the sounds of (prompt, seed) go: <prompt>_<seed>, the number of the row in front where there are more."""
    digits = max(3, len(str(len(prompts))))
    numbers = [f"{number:0{digits}d}_" if len(prompts) > 1 else "" for number in range(1, len(prompts) + 1)]
    return [
        folder / f"{number}{slug(prompt)}_{seed}{suffix}"
        for number, (prompt, seed) in zip(numbers, prompts, strict=True)
    ]
