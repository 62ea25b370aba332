"""The parts of a report: each a command of this project with a limit in seconds, run to its end or to that limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3_gpu_report.scrub import Scrubber
from sa3_trt_core.number_formats import finite

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
LOG_LINES = 4000  # of each log, its end
Figures = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One command. `column` is its matrix column, None for preparation; `after` are the parts that must pass first.

    `figures` reads what the command left; `skip` is why it is not run at all.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    backend: str | None = None
    column: str | None = None
    after: tuple[str, ...] = ()
    figures: Figures | None = None
    skip: str | None = None


@dataclass
class PartOutcome:
    """Result of a part: `why` is one line unless it passed; `cut_off` is True when its time limit ended it."""

    part: Part
    status: str
    seconds: float = 0.0
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    cut_off: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the entry of report.json."""
        return {
            "name": self.part.name, "backend": self.part.backend, "column": self.part.column, "status": self.status,
            "seconds": round(self.seconds, 1), "why": self.why, "figures": self.figures,
        }  # fmt: skip


def run_parts(parts: Sequence[Part], out: Path, scrub: Scrubber, minutes: float) -> list[PartOutcome]:
    """Run every part in order, regardless of failures; after `minutes` the rest is skipped. Logs go to out/logs."""
    ends = time.monotonic() + 60.0 * minutes
    done: dict[str, PartOutcome] = {}
    for part in parts:
        lacking = [name for name in part.after if name in done and done[name].status != PASSED]
        left = ends - time.monotonic()
        if part.skip is not None:
            outcome = PartOutcome(part, SKIPPED, why=part.skip)
        elif lacking:
            outcome = PartOutcome(part, SKIPPED, why=f"{lacking[0]} did not pass")
        elif left <= 0:
            outcome = PartOutcome(part, SKIPPED, why=f"{minutes:g} minutes are over")
        else:
            print(f"{part.name} ...", file=sys.stderr, flush=True)
            outcome = _run(part, out, scrub, min(part.limit, left))
            if outcome.cut_off and left < part.limit:
                outcome.status, outcome.why = SKIPPED, f"{minutes:g} minutes are over"
        done[part.name] = outcome
        print(f"{part.name}: {outcome.status} {outcome.why}".rstrip(), file=sys.stderr, flush=True)
    return list(done.values())


def _run(part: Part, out: Path, scrub: Scrubber, limit: float) -> PartOutcome:
    """Run one command in its own process group, so that no child process outlives its limit."""
    started = time.monotonic()
    log = out / "logs" / f"{part.name.replace(' ', '_').replace(',', '')}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    # Into a file, not a pipe: a process that left the group would hold a pipe open and keep the report waiting.
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                code = None
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    why = "" if code == 0 else f"exit code {code}: {_last(text)}"
    if code is None:
        why = f"not done after {limit:.0f} s"
    text = scrub("\n".join(text.splitlines()[-LOG_LINES:]) + "\n")
    log.write_text(text, "utf-8")
    figures: dict[str, Any] = {}
    if part.figures is not None:
        try:
            figures = finite(part.figures())
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            why = why or f"its result cannot be read: {error}"
    seconds = time.monotonic() - started
    return PartOutcome(part, FAILED if why else PASSED, seconds, scrub(why), figures, cut_off=code is None)


def _last(text: str) -> str:
    """Return the line of an output that states the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "FAILED", "E  "))]
    return (errors or lines or ["no output"])[-1][:240]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file that a part wrote."""
    return json.loads(path.read_text("utf-8"))
