"""Time complete generations: stages, memory and peers, written as JSON, Markdown and a plot."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sa3_bench.generation import Mark, quiet
from sa3_bench.results import machine
from sa3_bench.ring_rate import RING_HEADS, RingRate
from sa3_trt_core import console
from sa3_trt_core.artifacts import files

WARM_RUNS = 3  # the CUDA graph of a shape is captured when the shape occurs a second time
STAGES = ("text", "sample", "decode")
# Text to audio, 8 steps, in ms by seconds of sound: published by the authors or by others, not measured here.
PUBLISHED: Mapping[str, Mapping[float, float]] = {
    "published: TensorRT, H100": {3: 45, 30: 75, 120: 150},
    "published: TensorRT, H200": {5: 20, 30: 50, 120: 130, 380: 430},
    "published: the model's own PyTorch, H200": {5: 600, 30: 650, 120: 780, 380: 1310},
}


class Contestant(Protocol):
    """A generator of int16 samples (N, 2) in host memory."""

    device: torch.device

    def generate(self, seconds: float, seed: int, mark: Mark | None = None) -> Tensor: ...
    def release(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Timing:
    """One contestant at one length: ms of a whole call (median and deviation), its stages, bytes at the peak."""

    contestant: str
    seconds: float
    ms: float
    deviation: float
    stages: dict[str, float]
    peak_bytes: int
    first_ms: float


@dataclass
class Record:
    """Every timing of one run."""

    machine: dict[str, str]
    timings: list[Timing] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    rings: list[RingRate] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the tables that README and NOTES quote."""
        lengths = sorted({timing.seconds for timing in self.timings})
        names = list(dict.fromkeys(timing.contestant for timing in self.timings))
        rows = [[name, *(self._cell(name, seconds) for seconds in lengths)] for name in names]
        rows += [
            [name, *(f"{known[s]:g}" if s in known else "-" for s in lengths)] for name, known in PUBLISHED.items()
        ]
        parts = [f"Text to 16-bit samples in host memory, ms. {', '.join(self.machine.values())}"]
        parts.append(console.markdown(["", *(f"{seconds:g} s" for seconds in lengths)], rows))
        stages = [
            [timing.contestant, f"{timing.seconds:g}", *(f"{timing.stages[name]:.2f}" for name in STAGES),
             f"{timing.peak_bytes / 1e9:.2f}", f"{timing.first_ms:.0f}"]
            for timing in self.timings
        ]  # fmt: skip
        parts.append(console.markdown(["", "seconds", *STAGES, "peak GB", "first call"], stages))
        for heading, figures in (("dB", self.notes), ("seconds", self.starts)):
            if figures:
                parts.append(
                    console.markdown(["", heading], [[name, f"{value:.2f}"] for name, value in figures.items()])
                )
        if self.rings:
            parts.append(console.markdown(RING_HEADS, [run.cells() for run in self.rings]))
        return "\n\n".join(parts)

    def save(self, out: Path) -> None:
        """Write generate.json, generate.md and generate.png."""
        files.write_atomic_text(out / "generate.json", json.dumps(asdict(self), indent=2) + "\n")
        files.write_atomic_text(out / "generate.md", self.markdown() + "\n")
        _plot(self, out / "generate.png")

    def _cell(self, name: str, seconds: float) -> str:
        timings = [timing for timing in self.timings if (timing.contestant, timing.seconds) == (name, seconds)]
        return f"{timings[0].ms:.2f}" if timings else "-"


def new_record() -> Record:
    """Return an empty record of this machine."""
    return Record(machine())


def measure(name: str, contestant: Contestant, lengths: Sequence[float], repeats: int, others: int) -> list[Timing]:
    """Time a contestant at every length; lengths that do not fit into memory are skipped.

    `others` is the size of other objects on the GPU in bytes; peaks exclude it.
    """
    timings = []
    for seconds in lengths:
        try:
            with quiet():
                timings.append(_timing(name, contestant, seconds, repeats, others))
        except torch.OutOfMemoryError:
            print(f"{name}: not enough memory for {seconds:g} s", file=sys.stderr)
            torch.cuda.empty_cache()
        contestant.release()
    return timings


def _timing(name: str, contestant: Contestant, seconds: float, repeats: int, others: int) -> Timing:
    on_gpu = contestant.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first = _clock(contestant, seconds, 0)
    for seed in range(WARM_RUNS if on_gpu else 0):
        contestant.generate(seconds, seed)
    times = [_clock(contestant, seconds, seed) for seed in range(repeats)]
    middle = statistics.median(times)
    deviation = statistics.median(abs(ms - middle) for ms in times)
    stages = [_stages(contestant, seconds, seed) for seed in range(repeats)]
    parts = {stage: statistics.median(ms_by_stage[stage] for ms_by_stage in stages) for stage in STAGES}
    peak = torch.cuda.max_memory_allocated() - others if on_gpu else 0
    return Timing(name, seconds, middle, deviation, parts, peak, first)


def _clock(contestant: Contestant, seconds: float, seed: int) -> float:
    """Return the milliseconds of one call, up to its samples in host memory."""
    started = time.perf_counter()
    contestant.generate(seconds, seed)
    return 1e3 * (time.perf_counter() - started)


def _stages(contestant: Contestant, seconds: float, seed: int) -> dict[str, float]:
    """Return the milliseconds of each stage, with a synchronisation after each."""
    ms_by_stage: dict[str, float] = {}
    last = time.perf_counter()

    def mark(stage: str) -> None:
        nonlocal last
        if contestant.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        ms_by_stage[stage], last = 1e3 * (now - last), now

    contestant.generate(seconds, seed, mark)
    return ms_by_stage


def _plot(record: Record, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(timing.contestant for timing in record.timings):
        points = sorted((timing.seconds, timing.ms) for timing in record.timings if timing.contestant == name)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    for name, known in PUBLISHED.items():
        axes.plot(list(known), list(known.values()), marker="x", linestyle=":", label=name)
    axes.set(xlabel="seconds of sound", ylabel="ms, text to samples", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
