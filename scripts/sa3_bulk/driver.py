"""Distribution of a job's rows over actors, with replacement of lost actors."""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sa3_bulk.cluster import connected, require_ray
from sa3_bulk.worker import Worker
from sa3_trt_core import console
from sa3_trt_core.artifacts import files
from sa3_trt_core.cli import report, resume
from sa3_trt_core.cli.job import Job
from sa3_trt_core.cli.parser import LOCAL_RAY
from sa3_trt_core.errors import ToolError

TRIES = 5  # of a row whose worker is lost
USUAL_DEPTH = 4
AHEAD = 2  # rows submitted beyond the depth of the ring, so that a free slot never waits
START_SECONDS = 600.0  # time limit for the first worker to start
LOOK_SECONDS = 1.0
PROBE, STALE_SECONDS = ".sa3-probe-", 7 * 86_400.0


def produce_on_ray(job: Job, devices: Sequence[str]) -> report.Totals:
    """Generate and write the missing sounds of a job on Ray. Raises ToolError.

    Pending rows of a lost worker are generated again. Failed rows are reported after all others are written.
    """
    require_ray("--devices" if devices else "--ray")
    totals, started = report.Totals(), time.perf_counter()
    resume.keep_finished(job, totals)
    left = [index for index in range(len(job.requests)) if index not in totals.kept]
    if totals.kept and not job.options.quiet:
        print(f"{len(totals.kept)} of {len(job.requests)} sounds are there already", file=sys.stderr)
    if left:
        address = LOCAL_RAY if devices else job.options.ray or LOCAL_RAY
        with connected(address, devices) as workers, _probe(job.outs[0].parent) as probe:
            _run(_Spread(job, totals, left, probe, workers), address)
    totals.elapsed = time.perf_counter() - started
    return totals


def _run(spread: _Spread, address: str) -> None:
    """Generate the rows. Raises ToolError, also if Ray ends."""
    import ray

    try:
        spread.run()
    except (ray.exceptions.RayError, ConnectionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ToolError(
            f"the Ray at {address} has ended: {reason}", "run the same command again: what is written is kept"
        ) from None


@contextmanager
def _probe(folder: Path) -> Iterator[tuple[Path, str]]:
    """Write a file that identifies the output folder; yield its path and text."""
    for old in folder.glob(f"{PROBE}*"):  # of killed jobs; a recent one may belong to a running job
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                old.unlink()
    token = secrets.token_hex(16)
    path = folder / f"{PROBE}{token[:12]}"
    files.write_atomic_text(path, token)
    try:
        yield path, token
    finally:
        path.unlink(missing_ok=True)


@dataclass(eq=False)
class _Slot:
    """Slot of one worker: resources, actor, and the actor's pending rows by reference."""

    resources: dict[str, Any]
    actor: Any = None
    starting: Any = None  # reference of the result of `start`
    rows: dict[Any, int] = field(default_factory=dict)


class _Spread:
    """Dispatcher of a job's rows to the workers."""

    def __init__(
        self, job: Job, totals: report.Totals, rows: Sequence[int], probe: tuple[Path, str],
        resources: Sequence[dict[str, Any]],
    ) -> None:  # fmt: skip
        import ray

        self._job, self._totals, self._probe = job, totals, probe
        self._depth = job.options.depth or USUAL_DEPTH
        self._ray, self._remote, self._shared = ray, ray.remote(Worker), ray.put(job)
        self._waiting, self._left = deque(rows), set(rows)
        self._tries: dict[int, int] = {}
        self._failed: dict[int, tuple[str, str]] = {}
        self._slots = [_Slot(dict(resource)) for resource in resources[: len(rows)]]
        self._last_seen = time.monotonic()

    def run(self) -> None:
        """Generate all rows. Raises ToolError."""
        with console.Progress("generate", len(self._left), "sounds", quiet=self._job.options.quiet) as progress:
            for slot in self._slots:
                self._start(slot)
            while self._left:
                self._hand_out()
                self._collect(progress)
        if self._failed:
            rows = sorted(self._failed)
            message, hint = self._failed[rows[0]]
            numbers = ", ".join(str(self._job.numbers[row]) for row in rows)
            raise ToolError(
                f"{len(rows)} of {len(self._job.requests)} sounds are missing, rows {numbers}: {message}",
                f"{hint}; the others are written, and the same command makes what is missing",
            )

    def _start(self, slot: _Slot) -> None:
        """Start a new actor in a slot."""
        gpu = slot.resources["num_gpus"] > 0
        options = {**slot.resources, "max_restarts": 0, "max_concurrency": self._depth + AHEAD + 1}
        slot.actor = self._remote.options(**options).remote(self._shared, gpu, self._depth, self._probe, Path.cwd())
        slot.starting, slot.rows = slot.actor.start.remote(), {}

    def _hand_out(self) -> None:
        """Submit rows to every running worker up to its capacity."""
        for slot in self._slots:
            while slot.starting is None and self._waiting and len(slot.rows) < self._depth + AHEAD:
                row = self._waiting.popleft()
                slot.rows[slot.actor.make.remote(row)] = row

    def _collect(self, progress: console.Progress) -> None:
        """Collect finished rows and replace lost workers. Raises ToolError when no worker can be started."""
        pending = {slot.starting: slot for slot in self._slots if slot.starting is not None}
        pending |= {reference: slot for slot in self._slots for reference in slot.rows}
        done, _ = self._ray.wait(list(pending), num_returns=1, timeout=LOOK_SECONDS)
        for reference in done:
            slot = pending[reference]
            if reference is not slot.starting and reference not in slot.rows:
                continue  # of a worker lost meanwhile
            try:
                message, rest = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:  # a bug: keep its traceback
                raise RuntimeError(f"a worker failed: {error}") from None
            except self._ray.exceptions.RayError:  # lost actor, process or node, or out of memory
                self._lost(slot)
                continue
            self._last_seen = time.monotonic()
            self._take(slot, reference, message, rest, progress)
        if not done and not any(slot.rows for slot in self._slots):
            self._require_workers()

    def _take(self, slot: _Slot, reference: Any, message: str, rest: Any, progress: console.Progress) -> None:
        if reference is slot.starting:
            slot.starting = None
            if message:
                raise ToolError(message, rest)
            self._totals.add(rest["timings"])
            return
        row = slot.rows.pop(reference)
        self._left.discard(row)
        if message:
            self._failed[row] = (message, rest)
            return
        self._totals.add(rest["timings"], rest["memory"])
        self._totals.devices |= rest["devices"]
        self._totals.peaks[row] = rest["peak"]
        progress.advance(note=f"{len(self._totals.peaks) / max(1e-9, progress.elapsed):.2g} a second")

    def _lost(self, slot: _Slot) -> None:
        """Requeue the rows of a lost worker, and start a new one in its slot."""
        rows = sorted(slot.rows.values())
        for row in rows:
            self._tries[row] = self._tries.get(row, 0) + 1
            if self._tries[row] < TRIES:
                self._waiting.appendleft(row)
                continue
            self._left.discard(row)
            self._failed[row] = (f"their worker was lost {TRIES} times", "give fewer --devices or a smaller --depth")
        numbers = ", ".join(str(self._job.numbers[row]) for row in rows)
        again = f"; rows {numbers} are made again" if rows else ""
        print(f"a worker was lost{again}", file=sys.stderr, flush=True)
        self._start(slot)

    def _require_workers(self) -> None:
        waited = time.monotonic() - self._last_seen
        if waited > START_SECONDS:
            raise ToolError(
                f"no worker could be started for {waited:.0f} s",
                "see `ray status`: each worker needs one GPU, or one CPU in a cluster without GPUs",
            )
