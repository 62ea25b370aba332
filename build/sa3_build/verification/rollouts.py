"""Compare rollouts of candidate DiTs with a reference, expressed as the input perturbation with the same error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from sa3_build.graph import io as graph_io
from sa3_build.quantization.selection import fp8_share
from sa3_build.quantization.workspace import Workspace
from sa3_build.verification import parity as verification_parity
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative
from sa3_trt_core.console import Progress
from sa3_trt_core.engines.base import DiTVelocity
from sa3_validation.cases import calibration_cases, starts_of
from sa3_validation.distances import cosine
from sa3_validation.rollouts import PING_PONG, roll

CONTROLS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # relative L2 of the noise added to the DiT's input x
EVERY_STEP, START = "every-step", "start"  # perturb x at every step, or only the initial latents
STEPS = 8
FORMAT = 1
CONTROL_HEADER = ("perturbed by", "median rollout cosine", "worst rollout cosine")
HEADER = (
    "DiT", "FP8 share", "worst row cosine", "at sigma", "median rollout cosine", "worst rollout cosine",
    "median perturbation", "worst perturbation",
)  # fmt: skip


@dataclass(frozen=True)
class Rollout:
    """One rollout against the reference: cosine of the final latents, and the equivalent input perturbation.

    `perturbation` is a relative L2 of the input, infinite above the largest control.
    """

    cosine: float
    perturbation: float


@dataclass(frozen=True)
class CandidateRollouts:
    """One candidate: FP8 share, worst denoised cosine by sigma, and its rollouts by prompt."""

    name: str
    fp8_share: float
    worst_by_sigma: Mapping[float, float]
    rollouts: tuple[Rollout, ...]


def compare_generations(build: Workspace) -> Mapping[str, Any]:
    """Compare full generations of the result with the clean graph, and the latter with itself under known
    perturbations.
    """
    starts = varied_starts(build.calibration, build.settings.rollouts)
    controls, candidates = RolloutComparison(build.calibration, starts, None, low_memory=True).run(
        build.clean, [build.result]
    )
    kinds = build.calibration.kinds()
    return {"kinds": [kinds[start] for start in starts], **document(controls, candidates, EVERY_STEP)}


def varied_starts(calibration: CalibrationSet, count: int) -> list[int]:
    """Return at most `count` initial rows of a set, taking the kinds of row in turn."""
    kinds = calibration.kinds()
    by_kind: dict[str, list[int]] = {}
    for start in starts_of(calibration):
        by_kind.setdefault(kinds[start], []).append(start)
    in_turn = [start for turn in zip_longest(*by_kind.values()) for start in turn if start is not None]
    return sorted(in_turn[:count])


class RolloutComparison:
    """Rollouts from `starts` (rows of sigma 1) of a calibration set, and single steps on `rows` of its rows.

    Without `rows` only rollouts are run. `low_memory` leaves the weights on disk.
    """

    def __init__(
        self, calibration: CalibrationSet, starts: Sequence[int], rows: int | None, perturb: str = EVERY_STEP,
        low_memory: bool = False,
    ) -> None:  # fmt: skip
        """Seed the noise of later steps by a start's index among the starts, the same for all DiTs."""
        self._cases = [
            replace(case, seed=seed) for seed, case in enumerate(calibration_cases(calibration, sorted(starts)))
        ]
        self._rows = calibration.subset(()) if rows is None else representative(calibration, rows)
        self._start_only, self._low_memory = perturb == START, low_memory

    def run(self, reference: Path, candidates: Sequence[Path]) -> tuple[list[list[float]], list[CandidateRollouts]]:
        """Return controls (cosine by prompt and size) and candidates; one DiT is in memory at a time."""
        count, rows = len(self._cases), self._rows.rows
        total = (count * STEPS) * (1 + len(CONTROLS) + len(candidates)) + rows * (1 + len(candidates))
        with Progress("rollouts and rows", total, "forwards") as progress:
            with self._engine(reference) as engine:
                final_latents = self._final_latents(engine, 0.0, progress)
                at_sizes = [self._cosines(engine, final_latents, size, progress) for size in CONTROLS]
                controls = [list(row) for row in zip(*at_sizes, strict=True)]
                denoised = verification_parity.denoise_rows(engine, progress.counted(self._rows))
            rollouts = [self._compare(path, final_latents, controls, denoised, progress) for path in candidates]
        return controls, rollouts

    def _compare(
        self,
        path: Path,
        ends: Sequence[np.ndarray],
        controls: Sequence[Sequence[float]],
        denoised: Sequence[tuple[float, np.ndarray]],
        progress: Progress,
    ) -> CandidateRollouts:
        with self._engine(path) as engine:
            cosines = self._cosines(engine, ends, 0.0, progress)
            parity = verification_parity.parity_by_sigma(
                denoised, verification_parity.denoise_rows(engine, progress.counted(self._rows))
            )
        rollouts = tuple(
            Rollout(cosine, equivalent_perturbation(1 - cosine, [1 - control for control in row]))
            for cosine, row in zip(cosines, controls, strict=True)
        )
        return CandidateRollouts(
            str(path), fp8_share(graph_io.load(path)), {p.sigma: p.worst_cosine for p in parity}, rollouts
        )

    def _engine(self, path: Path) -> Any:
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path, low_memory=self._low_memory)

    def _final_latents(self, engine: Any, size: float, progress: Progress) -> list[np.ndarray]:
        """Return the final latents (1, 256, L), fp64, of every start.

        The DiT's input x is perturbed by noise of relative L2 `size`.
        """
        return [
            roll(DiTVelocity(engine), case, PING_PONG, STEPS, progress.advance, size, self._start_only).astype(
                np.float64
            )
            for case in self._cases
        ]

    def _cosines(self, engine: Any, reference: Sequence[np.ndarray], size: float, progress: Progress) -> list[float]:
        return [cosine(*pair) for pair in zip(reference, self._final_latents(engine, size, progress), strict=True)]


def equivalent_perturbation(drift: float, controls: Sequence[float], sizes: Sequence[float] = CONTROLS) -> float:
    """Return the perturbation size with the same error, interpolated between controls on logarithmic axes.

    Errors are 1 - cosine. Below the smallest control the first segment is extrapolated; the result is infinite above
    the largest. A control with a smaller error than the previous one counts as equal to it: rollouts are chaotic, and
    the size must be unique.
    """
    distances = np.maximum.accumulate(np.maximum(np.asarray(controls, np.float64), np.finfo(np.float64).tiny))
    if not drift <= distances[-1]:
        return math.inf
    if drift <= 0:
        return 0.0
    x, y = np.log(np.asarray(sizes)), np.log(distances)
    if drift < distances[0]:
        slope = (y[1] - y[0]) / (x[1] - x[0])
        return float(np.exp(x[0] + (np.log(drift) - y[0]) / slope)) if slope > 0 else float(sizes[0])
    return float(np.exp(np.interp(np.log(drift), y, x)))


def table_rows(candidates: Sequence[CandidateRollouts]) -> list[list[str]]:
    """Return the table cells, one candidate per row."""
    cells = []
    for candidate in candidates:
        sigma = min(candidate.worst_by_sigma, key=lambda s: candidate.worst_by_sigma[s])
        cosines = [rollout.cosine for rollout in candidate.rollouts]
        sizes = [rollout.perturbation for rollout in candidate.rollouts]
        cells.append(
            [
                candidate.name, f"{candidate.fp8_share:.1%}", f"{candidate.worst_by_sigma[sigma]:.6f}", f"{sigma:.4f}",
                f"{float(np.median(cosines)):.6f}", f"{min(cosines):.6f}",
                _size(float(np.median(sizes))), _size(max(sizes)),
            ]
        )  # fmt: skip
    return cells


def control_rows(controls: Sequence[Sequence[float]]) -> list[list[str]]:
    """Return the table cells of the controls: the reference's rollouts under perturbation, one size per row."""
    columns = zip(CONTROLS, zip(*controls, strict=True), strict=True)
    return [[f"{size:g}", f"{float(np.median(column)):.6f}", f"{min(column):.6f}"] for size, column in columns]


def prompt_rows(candidates: Sequence[CandidateRollouts]) -> list[list[str]]:
    """Return the table cells of the prompts: final cosine and equivalent perturbation, one candidate per column."""
    by_prompt = zip(*(candidate.rollouts for candidate in candidates), strict=True)
    return [
        [str(index), *(f"{rollout.cosine:.6f} = {_size(rollout.perturbation)}" for rollout in rollouts)]
        for index, rollouts in enumerate(by_prompt)
    ]


def document(controls: Sequence[Sequence[float]], compared: Sequence[CandidateRollouts], where: str) -> dict[str, Any]:
    """Return the JSON document; a perturbation above the largest control is null."""
    candidates = []
    for candidate in compared:
        entry = asdict(candidate)
        entry["worst_by_sigma"] = {f"{sigma:g}": cosine for sigma, cosine in candidate.worst_by_sigma.items()}
        for rollout in entry["rollouts"]:
            rollout["perturbation"] = None if math.isinf(rollout["perturbation"]) else rollout["perturbation"]
        candidates.append(entry)
    return {
        "format": FORMAT,
        "steps": STEPS,
        "perturbed": where,
        "sizes": CONTROLS,
        "controls": controls,
        "candidates": candidates,
    }


def drifted(rollout: Mapping[str, Any]) -> str:
    """Return the equivalent perturbation of one rollout of `document` as text."""
    return _size(math.inf if rollout["perturbation"] is None else rollout["perturbation"])


def _size(value: float) -> str:
    return f">{CONTROLS[-1]:g}" if math.isinf(value) else f"{value:.2e}"
