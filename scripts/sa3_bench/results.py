"""Run the benchmark: contestants at every shape, with checks, saved after each shape."""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3_bench import roofline, timing
from sa3_bench.comparison import Contest, Step
from sa3_bench.random_dit import random_inputs
from sa3_trt_core import console, gpu
from sa3_trt_core.artifacts import files
from sa3_trt_core.errors import GateError

STEPS = 8  # of a generation: a ring of D rows finishes D / 8 generations per forward
CALLS = 20


@dataclass
class Timing:
    """One contestant at one shape; `share` is the lower bound over the time, None without a GPU or for a peer.

    `memory` is the GPU memory in use by all contestants and all other processes, in bytes.
    """

    contestant: str
    rows: int
    frames: int
    ms: float
    spread: float
    share: float | None
    generations: float
    memory: int
    cosine: float | None
    batch_cosine: float | None
    call_ms: float | None


@dataclass
class Record:
    """Record of one run."""

    machine: dict[str, str]
    sizes: dict[str, Any]
    ceilings: dict[str, float]
    tiles: dict[str, Any]  # tile sizes of each precision's kernels, measured on this GPU before the run
    judged: list[str]  # contestants whose velocity is checked and whose time is compared with the others'
    reference: str
    peers: str
    timings: list[Timing] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table of the run, without columns that are empty for every contestant."""
        rows = []
        for entry in self.timings:
            best = [peer.ms for peer in self.timings if (peer.rows, peer.frames) == (entry.rows, entry.frames)
                    and peer.contestant not in self.judged]  # fmt: skip
            ratio = f"{min(best) / entry.ms:.2f}x" if best and entry.contestant in self.judged else ""
            rows.append([
                str(entry.rows), str(entry.frames), entry.contestant, f"{entry.ms:.2f}", ratio,
                f"{entry.generations:.1f}",
                "" if entry.share is None else f"{entry.share:.0%}",
                "" if entry.cosine is None else f"{entry.cosine:.5f}",
                "" if entry.batch_cosine is None else f"{entry.batch_cosine:.5f}",
                "" if entry.call_ms is None else f"{entry.call_ms:.2f}",
                console.format_bytes(entry.memory) if entry.memory else "",
            ])  # fmt: skip
        heads = ("rows", "L", "engine", "ms a step", f"against {self.peers}", "gens/s", "of the floor",
                 f"cosine to {self.reference}", "rows to serial", "ms a call", "memory")  # fmt: skip
        columns = [column for column in range(len(heads)) if any(line[column] for line in rows)]
        return console.markdown(
            [heads[column] for column in columns], [[line[column] for column in columns] for line in rows]
        )

    def save(self, out: Path) -> None:
        """Write bench.json and bench.md."""
        files.write_atomic_text(out / "bench.json", json.dumps(asdict(self), indent=2) + "\n")
        files.write_atomic_text(out / "bench.md", self.markdown() + "\n")


def run(contest: Contest, shapes: list[tuple[int, int]], repeats: int, out: Path) -> Record:
    """Time every contestant at every (rows, frames). Raises GateError for an output that is not finite or wrong."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        ceilings = roofline.measure(device) if device.type == "cuda" and contest.sizes is not None else None
        record = Record(
            machine(), asdict(contest.sizes) if contest.sizes else {}, asdict(ceilings) if ceilings else {},
            _tiles(contest), list(contest.judged), contest.reference_name, contest.peers_name,
        )  # fmt: skip
        with console.Progress("shapes", len(shapes), "shapes") as progress:
            for rows, frames in shapes:
                inputs = random_inputs(rows, frames, device, seed=frames)
                record.timings += _shape(contest, inputs, ceilings, repeats)
                record.save(out)
                _gate(record.timings[-len(contest.contestants) :], contest)
                progress.advance(1, f"{rows} x {frames}")
        _plot(record, out)
    return record


def _shape(
    contest: Contest, inputs: dict[str, Tensor], ceilings: roofline.Ceilings | None, repeats: int
) -> list[Timing]:
    """Return the timings of all contestants at one shape, alternating, after the checks."""
    rows, _, frames = inputs["x"].shape
    reference = contest.reference(inputs)
    velocities, batched, calls = {}, {}, {}
    for name, contestant in contest.contestants.items():
        velocities[name] = contestant.prepare(inputs)().clone()
        if name in contest.judged:
            if hasattr(contestant, "call"):
                calls[name] = _call_ms(contestant.call(inputs))
            if rows > 1:
                batched[name] = _rows_to_serial(contestant, inputs, velocities[name])
    steps = {name: contestant.prepare(inputs) for name, contestant in contest.contestants.items()}
    for step in steps.values():
        step()  # memory that a contestant allocates in its first step is counted
    memory = gpu.memory_in_use() or 0
    timings = []
    for name, (ms, spread) in timing.alternating(steps, repeats).items():
        share = _share(contest, name, rows, frames, ceilings, ms)
        timings.append(Timing(name, rows, frames, ms, spread, share, 1e3 * rows / STEPS / ms, memory,
                              _cosine(velocities[name], reference), batched.get(name), calls.get(name)))  # fmt: skip
    return timings


def _call_ms(call: Step) -> float:
    """Return the median ms of complete calls by the wall clock, up to the result on the CPU."""
    taken = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def _rows_to_serial(contestant: Any, inputs: dict[str, Tensor], batched: Tensor) -> float:
    """Return the worst cosine between a row of a batch and the same row alone."""
    worst = 1.0
    for row in range(batched.shape[0]):
        alone = contestant.prepare({name: value[row : row + 1] for name, value in inputs.items()})()
        worst = min(worst, _cosine(batched[row : row + 1], alone))
    return worst


def _cosine(velocity: Tensor, reference: Tensor) -> float:
    flat = velocity.double().flatten(1), reference.double().flatten(1)
    return float(torch.nn.functional.cosine_similarity(*flat).min())


def _share(
    contest: Contest, name: str, rows: int, frames: int, ceilings: roofline.Ceilings | None, ms: float
) -> float | None:
    if ceilings is None or contest.sizes is None or name not in contest.judged:
        return None
    return roofline.floor_ms(roofline.work_of(contest.sizes, rows, frames), ceilings, name) / ms


def _gate(timings: list[Timing], contest: Contest) -> None:
    lines = []
    for entry in timings:
        min_cosine = contest.judged.get(entry.contestant, min(contest.judged.values(), default=0.0))
        if entry.cosine is None or not entry.cosine >= min_cosine:  # `not >=` fails for NaN too
            lines.append(f"{entry.contestant}, {entry.rows} x {entry.frames}: cosine {entry.cosine} < {min_cosine}")
        if entry.batch_cosine is not None and not entry.batch_cosine >= min_cosine:
            lines.append(
                f"{entry.contestant}, {entry.rows} x {entry.frames}: a row in a batch differs from the same row alone"
            )
    if lines:
        raise GateError("an engine computes wrong values", "the figures of this run are invalid", "\n".join(lines))


def _tiles(contest: Contest) -> dict[str, Any]:
    tiles = {name: getattr(contestant, "tiles", None) for name, contestant in contest.contestants.items()}
    return {name: asdict(chosen) for name, chosen in tiles.items() if chosen is not None}


def machine() -> dict[str, str]:
    """Return the software versions and the GPU of the timings."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}
    if torch.cuda.is_available():
        import triton

        versions.update(card=torch.cuda.get_device_name(), cuda=str(torch.version.cuda), triton=triton.__version__)
    return versions


def _plot(record: Record, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(entry.contestant for entry in record.timings):
        points = sorted(
            (entry.frames, entry.ms) for entry in record.timings if entry.contestant == name and entry.rows == 1
        )
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    axes.set(
        xlabel="latent frames", ylabel="ms a step", xscale="log", yscale="log", title=record.machine.get("card", "CPU")
    )
    axes.legend()
    axes.grid(alpha=0.3)
    with files.atomic_path(out / "bench.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
