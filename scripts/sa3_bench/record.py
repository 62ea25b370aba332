"""One run of the benchmark: contestants by shape, with checks, saved after every shape."""

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

from sa3_bench import floor, peers, timing
from sa3_bench.subject import MEDIUM, SMALL, packed_of, random_inputs, random_module
from sa3_trt_core import console, files
from sa3_trt_core.errors import GateError
from sa3_trt_core.torch_dit.weights import Sizes

STEPS = 8  # of a generation: a ring of D rows finishes D / 8 generations a forward
CALLS = 20
LEAST_COSINE = {"fp8": 0.98, "fp16mixed": 0.9999}  # velocity, against the module: a check, not a quality figure
LEAST_BATCH_COSINE = {"fp8": 0.98, "fp16mixed": 0.9999}


@dataclass
class Timing:
    """One contestant at one shape; `share` is the floor over the time, None without a GPU or for a peer."""

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
    """Everything of one run."""

    machine: dict[str, str]
    sizes: dict[str, Any]
    ceilings: dict[str, float]
    tiles: dict[str, Any]  # of each precision's kernels, as measured on this card before the run
    timings: list[Timing] = field(default_factory=list)

    def markdown(self) -> str:
        """The table of the run."""
        rows = []
        for one in self.timings:
            best = [other.ms for other in self.timings if (other.rows, other.frames) == (one.rows, one.frames)
                    and other.contestant not in peers.OURS]  # fmt: skip
            ratio = f"{min(best) / one.ms:.2f}x" if best and one.contestant in peers.OURS else ""
            rows.append([
                str(one.rows), str(one.frames), one.contestant, f"{one.ms:.2f}", ratio, f"{one.generations:.1f}",
                "" if one.share is None else f"{one.share:.0%}", "" if one.cosine is None else f"{one.cosine:.5f}",
                "" if one.batch_cosine is None else f"{one.batch_cosine:.5f}",
                "" if one.call_ms is None else f"{one.call_ms:.2f}", console.format_bytes(one.memory),
            ])  # fmt: skip
        heads = ("rows", "L", "engine", "ms a step", "against the best peer", "gens/s", "of the floor",
                 "cosine to fp32", "rows to serial", "ms a call", "memory")  # fmt: skip
        return console.markdown(heads, rows)

    def save(self, out: Path) -> None:
        """bench.json and bench.md."""
        files.write_atomic_text(out / "bench.json", json.dumps(asdict(self), indent=2) + "\n")
        files.write_atomic_text(out / "bench.md", self.markdown() + "\n")


def run(wanted: list[str], shapes: list[tuple[int, int]], repeats: int, tiny: bool, out: Path) -> Record:
    """Time every contestant at every (rows, frames). Raises GateError when an output is not finite or not right."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.inference_mode():
        module = random_module(SMALL if tiny else MEDIUM, device)
        packed = packed_of(module, "fp8")
        contestants = {name: peers.make(name, module, packed, device) for name in wanted}
        ceilings = floor.measure(device) if device.type == "cuda" else None
        record = Record(_machine(), asdict(packed.sizes), asdict(ceilings) if ceilings else {}, _tiles(contestants))
        with console.Progress("shapes", len(shapes), "shapes") as progress:
            for rows, frames in shapes:
                inputs = random_inputs(rows, frames, device, seed=frames)
                reference = _reference(module, packed, inputs)
                record.timings += _shape(contestants, packed.sizes, inputs, reference, ceilings, repeats)
                record.save(out)
                _gate(record.timings[-len(contestants) :])
                progress.advance(1, f"{rows} x {frames}")
        _plot(record, out)
    return record


def _shape(
    contestants: dict[str, Any], sizes: Sizes, inputs: dict[str, Tensor], reference: Tensor,
    ceilings: floor.Ceilings | None, repeats: int,
) -> list[Timing]:  # fmt: skip
    """All contestants at one shape: checks first, then the timings, taking turns."""
    rows, _, frames = inputs["x"].shape
    found, batched, calls = {}, {}, {}
    for name, one in contestants.items():
        found[name] = one.prepare(inputs)().clone()
        if name in peers.OURS:
            calls[name] = _call_ms(one.call(inputs))
            if rows > 1:
                batched[name] = _rows_to_serial(one, inputs, found[name])
    steps = {name: one.prepare(inputs) for name, one in contestants.items()}
    memory = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    timings = []
    for name, (ms, spread) in timing.alternating(steps, repeats).items():
        share = _share(sizes, name, rows, frames, ceilings, ms)
        timings.append(Timing(name, rows, frames, ms, spread, share, 1e3 * rows / STEPS / ms, memory,
                              _cosine(found[name], reference), batched.get(name), calls.get(name)))  # fmt: skip
    return timings


def _call_ms(call: peers.Step) -> float:
    """The median of whole calls, by the clock: each ends with its result on the CPU."""
    taken = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        taken.append(1e3 * (time.perf_counter() - started))
    return statistics.median(taken)


def _reference(module: Any, packed: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The module's own velocity in fp32, row by row: attention in fp32 needs the memory."""
    from sa3_bench.subject import duration_token

    token = duration_token(packed, inputs["seconds_total"])
    keep = inputs["t5_mask"].unsqueeze(-1) > 0.5
    text = torch.where(keep, inputs["t5_hidden"], module.prompt_padding_embedding)
    context = torch.cat([text, token.unsqueeze(1)], dim=1)
    found = [
        module(inputs["x"][row], inputs["t"][row], encoder_hidden_states=context[row],
               global_hidden_states=token[row], local_add_cond=inputs["local_add_cond"][row], return_dict=False)[0]
        for row in (slice(index, index + 1) for index in range(len(token)))
    ]  # fmt: skip
    return torch.cat(found)


def _rows_to_serial(contestant: Any, inputs: dict[str, Tensor], batched: Tensor) -> float:
    """The worst cosine between a row of a batch and the same row alone."""
    worst = 1.0
    for row in range(batched.shape[0]):
        alone = contestant.prepare({name: value[row : row + 1] for name, value in inputs.items()})()
        worst = min(worst, _cosine(batched[row : row + 1], alone))
    return worst


def _cosine(found: Tensor, reference: Tensor) -> float:
    flat = found.double().flatten(1), reference.double().flatten(1)
    return float(torch.nn.functional.cosine_similarity(*flat).min())


def _share(sizes: Sizes, name: str, rows: int, frames: int, ceilings: floor.Ceilings | None, ms: float) -> float | None:
    if ceilings is None or name not in peers.OURS:
        return None
    return floor.floor_ms(floor.work_of(sizes, rows, frames), ceilings, name) / ms


def _gate(timings: list[Timing]) -> None:
    lines = []
    for one in timings:
        least = LEAST_COSINE.get(one.contestant, LEAST_COSINE["fp8"])
        if one.cosine is None or not one.cosine >= least:  # not >= : a cosine that is no number fails too
            lines.append(f"{one.contestant}, {one.rows} x {one.frames}: cosine {one.cosine} < {least}")
        if one.batch_cosine is not None and one.batch_cosine < LEAST_BATCH_COSINE[one.contestant]:
            lines.append(f"{one.contestant}, {one.rows} x {one.frames}: a row differs from itself alone")
    if lines:
        raise GateError("an engine computes something else", "the figures of this run mean nothing", "\n".join(lines))


def _tiles(contestants: dict[str, Any]) -> dict[str, Any]:
    return {name: asdict(one.tiles) for name, one in contestants.items() if getattr(one, "tiles", None) is not None}


def _machine() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine()}
    if torch.cuda.is_available():
        import triton

        found.update(card=torch.cuda.get_device_name(), cuda=str(torch.version.cuda), triton=triton.__version__)
    return found


def _plot(record: Record, out: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in dict.fromkeys(one.contestant for one in record.timings):
        points = sorted((one.frames, one.ms) for one in record.timings if one.contestant == name and one.rows == 1)
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
    axes.set(
        xlabel="latent frames", ylabel="ms a step", xscale="log", yscale="log", title=record.machine.get("card", "CPU")
    )
    axes.legend()
    axes.grid(alpha=0.3)
    with files.atomic_path(out / "bench.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
