"""Time calls by CUDA events, alternating between contestants; figures are medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

WARM_RUNS = 10


def median_ms(run: Callable[[], Any], repeats: int) -> float:
    """Return the milliseconds of one call."""
    return alternating({"": run}, repeats)[""][0]


def alternating(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Return (median, median deviation) in ms of each call; calls alternate, so that load affects all equally.

    CUDA events on a GPU, the clock on a CPU.
    """
    on_gpu = torch.cuda.is_available()
    for run in runs.values():
        for _ in range(WARM_RUNS if on_gpu else 1):
            run()
    taken: dict[str, list[Any]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(_events(run) if on_gpu else _clock(run))
    if on_gpu:
        torch.cuda.synchronize()
        taken = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in taken.items()}
    medians = {}
    for name, times in taken.items():
        middle = statistics.median(times)
        medians[name] = middle, statistics.median(abs(ms - middle) for ms in times)
    return medians


def _events(run: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end


def _clock(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)
