"""How far whole generations drift from a reference DiT, as the perturbation of its input that drifts as far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_build.graph import io as graph_io, query
from sa3_build.graph.fp32_islands import SCALAR_INPUTS
from sa3_build.graph.quantizers import dequantizers
from sa3_build.verification import parity as verification_parity
from sa3_trt_core import conditioning
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, ChosenRows, Row, tensors
from sa3_trt_core.console import Progress
from sa3_trt_core.engines.base import DiTVelocity
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampling import sampler, schedule
from sa3_validation.perturbation import Perturbed, off_by, started

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import VelocityEngine

CONTROLS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # relative L2 of what is added to what the DiT reads
EVERY_STEP, START = "every-step", "start"  # where: at each step, or to the start alone, which ping-pong soon replaces
STEPS = 8
OTHER_SEEDS = 10**6  # of perturbations: apart from those of the noise, which are the prompts' places
FORMAT = 1
CONTROL_HEADER = ("perturbed by", "median rollout cosine", "worst rollout cosine")
HEADER = (
    "DiT", "FP8 share", "worst row cosine", "at sigma", "median rollout cosine", "worst rollout cosine",
    "median perturbation", "worst perturbation",
)  # fmt: skip


@dataclass(frozen=True)
class Rollout:
    """One prompt through one DiT against the reference: cosine of the final latents, and the control that equals it.

    `perturbation` is a relative L2 of the input, infinite above the largest control.
    """

    cosine: float
    perturbation: float


@dataclass(frozen=True)
class Compared:
    """One candidate: its share in FP8, the worst denoised cosine by sigma, and its rollouts by prompt."""

    name: str
    fp8_share: float
    worst_by_sigma: Mapping[float, float]
    rollouts: tuple[Rollout, ...]


def starts_of(calibration: CalibrationSet) -> list[int]:
    """The rows that generations can start from: of sigma 1, so that x is pure noise; the rest is the conditioning.

    Raises ToolError when the set has no such row.
    """
    starts = [index for index, sigma in enumerate(calibration.sigmas()) if sigma == 1.0]
    if not starts:
        raise ToolError(f"{calibration.path} has no row of sigma 1", "make a set with build/make_calib.py")
    return starts


def varied_starts(calibration: CalibrationSet, count: int) -> list[int]:
    """At most `count` starts of a set, its kinds of row in turn."""
    kinds = calibration.kinds()
    by_kind: dict[str, list[int]] = {}
    for start in starts_of(calibration):
        by_kind.setdefault(kinds[start], []).append(start)
    in_turn = [start for turn in zip_longest(*by_kind.values()) for start in turn if start is not None]
    return sorted(in_turn[:count])


class DriftStudy:
    """Rollouts from `starts` (rows of sigma 1) of a calibration set, and single steps on `rows` of its rows.

    Without `rows` there are rollouts alone. `low_memory` is for DiTs that hardly fit: their weights stay on the disk.
    """

    def __init__(
        self, calibration: CalibrationSet, starts: Sequence[int], rows: int | None, perturb: str = EVERY_STEP,
        low_memory: bool = False,
    ) -> None:  # fmt: skip
        self._starts = list(ChosenRows(calibration, frozenset(starts)))
        self._rows = (
            ChosenRows(calibration, frozenset())
            if rows is None
            else verification_parity.parity_rows_of(calibration, rows)
        )
        self._steps, self._perturb, self._low_memory = schedule.sigmas(STEPS), perturb, low_memory

    def run(self, reference: Path, candidates: Sequence[Path]) -> tuple[list[list[float]], list[Compared]]:
        """Controls (cosine by prompt and size) and candidates; one DiT is in memory at a time.

        The noise of every later step is drawn from the prompt's place in the set: all DiTs and controls share it.
        """
        count, rows = len(self._starts), self._rows.rows
        total = (count * STEPS) * (1 + len(CONTROLS) + len(candidates)) + rows * (1 + len(candidates))
        with Progress("rollouts and rows", total, "forwards") as progress:
            with self._engine(reference) as engine:
                ends = [self._roll(engine, index, 0.0, progress) for index in range(count)]
                controls = [
                    [
                        verification_parity.cosine(ends[index], self._roll(engine, index, size, progress))
                        for size in CONTROLS
                    ]
                    for index in range(count)
                ]
                denoised = self._denoise(engine, progress)
            found = [self._one(path, ends, controls, denoised, progress) for path in candidates]
        return controls, found

    def _one(
        self,
        path: Path,
        ends: Sequence[np.ndarray],
        controls: Sequence[Sequence[float]],
        denoised: Sequence[tuple[float, np.ndarray]],
        progress: Progress,
    ) -> Compared:
        with self._engine(path) as engine:
            cosines = [
                verification_parity.cosine(end, self._roll(engine, index, 0.0, progress))
                for index, end in enumerate(ends)
            ]
            parity = verification_parity.parity_by_sigma(denoised, self._denoise(engine, progress))
        rollouts = tuple(
            Rollout(cosine, equivalent(1 - cosine, [1 - control for control in row]))
            for cosine, row in zip(cosines, controls, strict=True)
        )
        return Compared(str(path), fp8_share(path), {p.sigma: p.worst_cosine for p in parity}, rollouts)

    def _engine(self, path: Path) -> Any:
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, low_memory=self._low_memory)

    def _denoise(self, engine: Any, progress: Progress) -> list[tuple[float, np.ndarray]]:
        return verification_parity.denoise_rows(engine, _counted(self._rows, progress))

    def _roll(self, engine: Any, index: int, size: float, progress: Progress) -> np.ndarray:
        """The final latent (1, 256, L), fp64, of one prompt, with its input off by `size` of its length."""
        row = tensors(self._starts[index])
        shape = row["x"].shape[1:]
        noise, directions = sampler.row_noise([index], *shape), sampler.row_noise([OTHER_SEEDS + index], *shape)
        start = row["x"]
        plain = DiTVelocity(engine)
        dit: VelocityEngine = plain
        if size and self._perturb == START:
            start = off_by(start, size, next(directions))
        elif size:
            dit = Perturbed(plain, size, directions)
        latent = sampler.ping_pong(
            dit, started(start, noise), self._steps, _conditioning(row), lambda *_: progress.advance()
        )
        return latent.numpy().astype(np.float64)


def equivalent(drift: float, controls: Sequence[float], sizes: Sequence[float] = CONTROLS) -> float:
    """The size of a perturbation that drifts as far, by interpolation between controls, both axes logarithmic.

    Drifts are 1 - cosine. Below the smallest control the first segment goes on; infinite above the largest. A control
    that drifts less than a smaller one counts as much as that one: chaos makes such steps, and a size must be unique.
    """
    heights = np.maximum.accumulate(np.maximum(np.asarray(controls, np.float64), np.finfo(np.float64).tiny))
    if not drift <= heights[-1]:
        return math.inf
    if drift <= 0:
        return 0.0
    x, y = np.log(np.asarray(sizes)), np.log(heights)
    if drift < heights[0]:
        slope = (y[1] - y[0]) / (x[1] - x[0])
        return float(np.exp(x[0] + (np.log(drift) - y[0]) / slope)) if slope > 0 else float(sizes[0])
    return float(np.exp(np.interp(np.log(drift), y, x)))


def fp8_share(path: Path) -> float:
    """Share of the weighted multiply-adds of one token that a DiT graph runs in FP8, the front end left out."""
    model = graph_io.load(path)
    model.graph.sort()
    behind = query.graph_inputs_behind(model)
    fp8 = everything = 0
    for node in model.graph:
        if node.op_type not in query.PRODUCTS or behind[node] <= SCALAR_INPUTS:
            continue
        pair = dequantizers(node)
        quantised = pair[0] is not None and pair[1] is not None
        weight = pair[1].inputs[0] if pair[1] is not None else query.weight_of(node)
        if weight is not None and weight.producer() is not None:  # a weight that is quantised when it is read
            weight = weight.producer().inputs[0]  # type: ignore[union-attr]
        if weight is None or weight.shape is None or not weight.is_initializer():
            continue
        macs = int(np.prod(weight.shape.numpy()))
        everything += macs
        fp8 += macs if quantised else 0
    return fp8 / everything if everything else 0.0


def table_rows(found: Sequence[Compared]) -> list[list[str]]:
    """Cells of the table, a candidate a row."""
    cells = []
    for one in found:
        sigma = min(one.worst_by_sigma, key=lambda s: one.worst_by_sigma[s])
        cosines = [rollout.cosine for rollout in one.rollouts]
        sizes = [rollout.perturbation for rollout in one.rollouts]
        cells.append(
            [
                one.name, f"{one.fp8_share:.1%}", f"{one.worst_by_sigma[sigma]:.6f}", f"{sigma:.4f}",
                f"{float(np.median(cosines)):.6f}", f"{min(cosines):.6f}",
                _size(float(np.median(sizes))), _size(max(sizes)),
            ]
        )  # fmt: skip
    return cells


def control_rows(controls: Sequence[Sequence[float]]) -> list[list[str]]:
    """Cells of the controls: how far the reference drifts from itself, a size a row."""
    columns = zip(CONTROLS, zip(*controls, strict=True), strict=True)
    return [[f"{size:g}", f"{float(np.median(column)):.6f}", f"{min(column):.6f}"] for size, column in columns]


def prompt_rows(found: Sequence[Compared]) -> list[list[str]]:
    """Cells of the prompts: final cosine and equivalent perturbation, a candidate a column."""
    by_prompt = zip(*(one.rollouts for one in found), strict=True)
    return [
        [str(index), *(f"{rollout.cosine:.6f} = {_size(rollout.perturbation)}" for rollout in rollouts)]
        for index, rollouts in enumerate(by_prompt)
    ]


def document(controls: Sequence[Sequence[float]], found: Sequence[Compared], perturb: str) -> dict[str, Any]:
    """Everything, as JSON: a perturbation above the largest control is null."""
    candidates = []
    for one in found:
        entry = asdict(one)
        entry["worst_by_sigma"] = {f"{sigma:g}": cosine for sigma, cosine in one.worst_by_sigma.items()}
        for rollout in entry["rollouts"]:
            rollout["perturbation"] = None if math.isinf(rollout["perturbation"]) else rollout["perturbation"]
        candidates.append(entry)
    return {
        "format": FORMAT,
        "steps": STEPS,
        "perturbed": perturb,
        "sizes": CONTROLS,
        "controls": controls,
        "candidates": candidates,
    }


def drifted(rollout: Mapping[str, Any]) -> str:
    """The perturbation of one rollout of `document`, for people."""
    return _size(math.inf if rollout["perturbation"] is None else rollout["perturbation"])


def _counted(rows: Iterable[Row], progress: Progress) -> Iterator[Row]:
    for row in rows:
        yield row
        progress.advance()


def _size(value: float) -> str:
    return f">{CONTROLS[-1]:g}" if math.isinf(value) else f"{value:.2e}"


def _conditioning(row: Mapping[str, Tensor]) -> conditioning.Conditioning:
    return conditioning.Conditioning(row["t5_hidden"], row["t5_mask"], row["seconds_total"], row["local_add_cond"])
