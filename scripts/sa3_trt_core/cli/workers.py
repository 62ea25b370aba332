"""Many sounds on several devices: one process each, whose rows are tried once more if it is lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sa3_trt_core import console
from sa3_trt_core.cli import devices, report, streams
from sa3_trt_core.cli.arguments import warnings_shown
from sa3_trt_core.cli.job import Job
from sa3_trt_core.cli.run import open_generator, write_sounds
from sa3_trt_core.errors import ToolError
from sa3_trt_core.pipeline import TOGETHER
from sa3_trt_core.request import batches, ring_groups

if TYPE_CHECKING:
    from sa3_trt_core.pipeline import Generator

TRIES = 2
RING_TURNS = 4  # times the depth: rows that one process takes from the others at a time

_generator: Generator | None = None  # of a worker process
_shown = contextlib.ExitStack()  # of a worker process: its warnings are printed as long as it lives


def produce_on(names: tuple[str, ...], job: Job) -> report.Totals:
    """Generate and write the sounds of a job with a process on each device; rows go to whichever is free.

    Raises ToolError: what a worker refuses, or rows whose worker was lost twice, when all others are written.
    """
    shared = _Shared(report.Totals())
    for rows in _shares(job, len(names)):
        shared.waiting.put((rows, 1))
    started = time.perf_counter()
    with console.Progress("generate", len(job.requests), "sounds", quiet=job.options.quiet) as progress:
        with ThreadPoolExecutor(max_workers=len(names)) as threads:
            turns = [threads.submit(_serve, name, job, shared, progress) for name in names]
        for turn in turns:
            turn.result()
    shared.totals.elapsed = time.perf_counter() - started
    if shared.lost:
        rows, count = sorted(shared.lost), len(job.requests)
        raise ToolError(
            f"{len(rows)} of {count} sounds are missing, rows {_numbers(rows)}: their worker was lost twice",
            "the others are written; free memory, or give fewer --devices, and run those rows again",
        )
    return shared.totals


@dataclass
class _Shared:
    """What the threads of the devices share: rows that wait (with the number of this try), results, rows given up."""

    totals: report.Totals
    waiting: queue.SimpleQueue[tuple[list[int], int]] = field(default_factory=queue.SimpleQueue)
    lost: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)


def _serve(name: str, job: Job, shared: _Shared, progress: console.Progress) -> None:
    """Give one device rows until none wait; a process that is lost is replaced."""
    pool: ProcessPoolExecutor | None = None
    try:
        while not shared.stopped.is_set():
            try:
                rows, attempt = shared.waiting.get_nowait()
            except queue.Empty:
                return
            pool = pool or _pool(name)
            try:
                totals = pool.submit(_work, job, rows).result()
            except BrokenProcessPool:
                pool.shutdown()
                pool = None
                _lost(name, rows, attempt, shared)
                continue
            with shared.lock:
                shared.totals.join(totals, rows)
                progress.advance(len(rows), note=f"device {name}")
    except BaseException:
        shared.stopped.set()
        raise
    finally:
        if pool is not None:
            pool.shutdown()


def _lost(name: str, rows: list[int], attempt: int, shared: _Shared) -> None:
    if attempt < TRIES:
        said = f"the worker on device {name} was lost; rows {_numbers(rows)} are tried once more"
        print(said, file=sys.stderr, flush=True)
        shared.waiting.put((rows, attempt + 1))
        return
    with shared.lock:
        shared.lost.extend(rows)


def _numbers(rows: list[int]) -> str:
    """Rows as their user counts them, from 1."""
    return ", ".join(str(index + 1) for index in rows)


def _pool(name: str) -> ProcessPoolExecutor:
    """A process of its own. Spawned: one that is forked would share the driver and the threads of this one."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (name,))


def _start(name: str) -> None:
    """The first thing in a worker: see one device, and end with the process that started it, however that ends."""
    streams.make_usable()
    _shown.enter_context(warnings_shown())
    devices.use_device(name)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(job: Job, rows: list[int]) -> report.Totals:
    """In a worker: generate and write some rows of a job; the engines stay open for the next."""
    global _generator  # noqa: PLW0603  # a worker serves one job, and its engines live as long as the process
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    part = replace(job, requests=[job.requests[row] for row in rows], outs=[job.outs[row] for row in rows])
    totals = report.Totals()
    if _generator is None:
        _generator = open_generator(part, totals, lambda *step: None)
    write_sounds(_generator, part, totals, lambda *step: None)
    return totals


def _shares(job: Job, count: int) -> list[list[int]]:
    """The rows that are handed out together: a batch, some turns of a ring, or a block where models are freed."""
    options = job.options
    if options.depth is not None:
        size = RING_TURNS * options.depth
        groups = ring_groups(job.requests, options.depth)
        return [group[at : at + size] for group in groups for at in range(0, len(group), size)]
    found = list(batches(job.requests, options.batch or 1))
    if not options.free_models:
        return found
    size = min(TOGETHER, -(-len(job.requests) // count))
    rows = [row for group in found for row in group]
    return [rows[at : at + size] for at in range(0, len(rows), size)]
