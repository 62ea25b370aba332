"""Progress on stderr, and plain text for numbers and tables on stdout."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

LINE_EVERY_SECONDS = 5.0  # on a file or a pipe
REDRAW_EVERY_SECONDS = 0.1  # on a terminal
T = TypeVar("T")


class Progress:
    """Count, percentage, elapsed and remaining time of one long stage, on stderr.

    A terminal gets one line that is rewritten; a file or a pipe gets a line at most every 5 s, and the last one.
    """

    def __init__(self, label: str, total: int, unit: str = "rows", quiet: bool = False) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self.quiet = quiet
        self.count = 0
        self._note = ""
        self._started = self._shown = time.monotonic()
        self._shown_count = -1
        self._width = 0
        self._terminal = sys.stderr.isatty()
        self._lock = threading.Lock()

    def __enter__(self) -> Progress:
        self._started = self._shown = time.monotonic()
        if self._terminal:
            self._show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown_count != self.count and (self.count or error is None):
            self._show()  # a stage that failed at once has no progress to show
        if self._terminal and not self.quiet:
            print(file=sys.stderr, flush=True)

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self._started

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more, from any thread; `note` is shown after the figures."""
        with self._lock:
            self.count += n
            self._note = note
            every = REDRAW_EVERY_SECONDS if self._terminal else LINE_EVERY_SECONDS
            if self.count >= self.total or time.monotonic() - self._shown >= every:
                self._show()

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, counting each when the next is requested."""
        for item in items:
            yield item
            self.advance()

    def _show(self) -> None:
        self._shown = time.monotonic()
        self._shown_count = self.count
        if self.quiet:
            return
        text = self._text(self._shown - self._started)
        if self._terminal:
            print(f"\r{text:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def _text(self, elapsed: float) -> str:
        share = f" {100 * self.count / self.total:3.0f}%" if self.total > 0 else ""
        text = f"{self.label}: {self.count}/{self.total} {self.unit}{share}, {format_seconds(elapsed)}"
        if 0 < self.count < self.total:
            text += f", {format_seconds(elapsed / self.count * (self.total - self.count))} left"
        return f"{text}  {self._note}" if self._note else text


def format_bytes(n: int) -> str:
    """Format bytes in decimal units, as on the hub ("2.9 GB")."""
    if abs(n) < 1000:
        return f"{n} B"
    value = float(n)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if abs(value) < 999.95 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


def format_seconds(s: float) -> str:
    """Format a duration: 0.42 s, 12.3 s, 3 min 05 s, 2 h 07 min."""
    if s < 10:
        return f"{s:.2f} s"
    if s < 59.95:
        return f"{s:.1f} s"
    minutes, seconds = divmod(round(s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain-text table with a ruled header; columns of numbers are right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = [bool(rows) and all(_numeric(row[column]) for row in rows) for column in range(len(header))]

    def render(line: Sequence[str]) -> str:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([render(lines[0]), "  ".join("-" * w for w in widths), *(render(line) for line in lines[1:])])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the cells as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _numeric(cell: str) -> bool:
    return cell in ("", "-") or cell.lstrip("+-")[:1].isdigit()
