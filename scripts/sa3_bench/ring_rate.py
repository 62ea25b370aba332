"""Measure a live ring: decoded sounds in host memory per second, and the time from submission to sound."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.live_ring import LiveRing

if TYPE_CHECKING:
    from sa3_trt_core.pipeline import Generator
    from sa3_trt_core.request import Request
    from sa3_trt_core.result import Result


PROMPT = "slow piano over soft strings, 70 BPM"
RING_HEADS = ("depth", "sounds per second", "share of the DiT", "p50 s", "p99 s")


@dataclass(frozen=True)
class RingRate:
    """Figures of one run.

    `dit_share` is the share of the elapsed time in which a step of the DiT ran, on a GPU between CUDA events of its
    stream. `gap_p50` and `gap_p99` are the ms between two steps there (0 on a CPU). `p50` and `p99` are the seconds
    from submission to sound.
    """

    depth: int
    sounds: int
    elapsed: float
    dit_share: float
    p50: float
    p99: float
    gap_p50: float = 0.0
    gap_p99: float = 0.0

    def cells(self) -> list[str]:
        """Return the cells of the table row under RING_HEADS."""
        return [f"{self.depth}", f"{self.rate:.2f}", f"{self.dit_share:.3f}", f"{self.p50:.3f}", f"{self.p99:.3f}"]

    @property
    def rate(self) -> float:
        """Return the sounds per second."""
        return self.sounds / self.elapsed


def rings_of_folder(folder: Path, seconds: float, depths: Sequence[int], count: int) -> list[RingRate]:
    """Time rings of these depths, `count` sounds each, on the FP8 engines that `write_engines` wrote to a folder."""
    from sa3_trt_core.pipeline import Generator
    from sa3_trt_core.request import Request

    request = Request(PROMPT, seconds)
    with Generator.load(
        precision="fp8", backend="torch", onnx_root=folder / "onnx", models_dir=folder / "models"
    ) as generator:
        return [measure_ring(generator, request, depth, count) for depth in depths]


def measure_ring(generator: Generator, request: Request, depth: int, count: int) -> RingRate:
    """Generate `count` sounds of different seeds, with enough in flight to keep the ring and its queue full.

    The first 2 x depth of them compile and capture, and are not timed.
    """
    times: list[float] = []
    with LiveRing(generator, depth, max_waiting=4 * depth) as ring:
        _drive(ring, request, 2 * depth, depth, [])
        ring.clock.restart()
        started = time.perf_counter()
        sampled = _drive(ring, request, count, depth, times)
        elapsed = time.perf_counter() - started
        gaps, busy = sorted(ring.clock.gaps_ms()), ring.clock.busy_ms() / 1e3
    times.sort()
    return RingRate(
        depth, count, elapsed, (busy or sampled) / elapsed, quantile(times, 0.5), quantile(times, 0.99),
        quantile(gaps, 0.5), quantile(gaps, 0.99),
    )  # fmt: skip


def quantile(ordered: list[float], part: float) -> float:
    """Return the quantile `part` (0..1) of ascending values; 0 without values."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0


def _drive(ring: LiveRing, request: Request, count: int, depth: int, times: list[float]) -> float:
    """Keep 2 x depth requests in flight until `count` sounds exist; return the sampler's seconds of all."""
    under_way: dict[Future[Result], float] = {}
    sampled, sent = 0.0, 0
    while sent < count or under_way:
        while sent < count and len(under_way) < 2 * depth:
            under_way[ring.submit(replace(request, seed=request.seed + sent))] = time.perf_counter()
            sent += 1
        done, _ = wait(under_way, return_when=FIRST_COMPLETED)
        for future in done:
            times.append(time.perf_counter() - under_way.pop(future))
            sampled += future.result().timings["sample"]
    return sampled
