"""Run the comparison of two DiTs: all DiTs in turn on the same rows and noise, one open at a time, then the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sa3_trt_core import shapes
from sa3_trt_core.audio import autoencoder
from sa3_trt_core.console import Progress
from sa3_validation import fp16_collision, rollouts
from sa3_validation.cases import TEXT, Case, StepInput, guided_case, inpaint_case
from sa3_validation.distances import Distance, distance
from sa3_validation.models import ComparedModel
from sa3_validation.rollouts import PING_PONG, SAMPLERS, Recorder

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

CANDIDATE, PERTURBED, OTHER = (
    "candidate",
    "perturbed",
    "other_kernels",
)  # DiTs compared with the reference
COMPARED = (CANDIDATE, PERTURBED, OTHER)
Ends = dict[tuple[str, str], np.ndarray]  # (sampler, case) -> final latent


@dataclass
class StudyResult:
    """Results of all runs of a study, keyed by DiT ("reference" and COMPARED).

    `latents` are final latents by DiT, sampler and case; `velocities` are of every row; `batch_rows` are indices of
    rows, and `batches` the velocities (B, 256, L) of the first B of those, by DiT and B. `fp16_collision` is the result
    of fp16_collision.velocity_differences by DiT. `sounds` are decoded generations, fp32 (samples, 2), by DiT and case.
    """

    cases: list[Case]
    rows: list[StepInput] = field(default_factory=list)
    velocities: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"reference": [], CANDIDATE: []})
    latents: dict[str, Ends] = field(default_factory=dict)
    fp16_collision: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    batch_rows: list[int] = field(default_factory=list)
    batches: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    sounds: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """Specification of a comparison: the models, sampler steps, and how many text cases are also in-painted and guided.

    `extra` is that number. Without `control` the comparison with other kernels is left out.
    """

    reference: ComparedModel
    candidate: ComparedModel
    control: ComparedModel | None
    steps: int
    extra: int

    def run(self, cases: Sequence[Case], rows: Sequence[StepInput]) -> StudyResult:
        """Run all DiTs in turn and return their results.

        `rows` are single steps in addition to those that the reference's own generations pass through.
        """
        result = StudyResult(list(cases))
        with Progress("forwards", self._forwards(cases, rows), "forwards") as progress:
            with self.reference.open() as engine:
                self._generate_reference(engine, result, progress)
                self._record(engine, result, rows, progress)
                result.latents[PERTURBED] = self._ends(engine, result, progress, rollouts.PERTURBATION)
                result.batch_rows = _spread_rows(result.rows)
                result.batches["reference"] = self._batches(engine, result, progress)
                result.fp16_collision["reference"] = _fp16_collision(engine, result)
            if self.control is not None:
                with self.control.open() as engine:
                    result.latents[OTHER] = self._ends(engine, result, progress)
            with self.candidate.open() as engine:
                for row in result.rows:
                    result.velocities[CANDIDATE].append(rollouts.step(engine, row))
                    progress.advance(note=f"{self.candidate.name}, steps")
                result.latents[CANDIDATE] = self._ends(engine, result, progress)
                result.batches[CANDIDATE] = self._batches(engine, result, progress)
                result.fp16_collision[CANDIDATE] = _fp16_collision(engine, result)
        return result

    def _generate_reference(self, engine: GraphEngine, result: StudyResult, progress: Progress) -> None:
        """Generate with the reference and record its steps; derive in-painting and guided cases of the first texts."""
        ends = result.latents["reference"] = {}
        queue = list(result.cases)
        texts = [case for case in queue if case.kind == TEXT][: self.extra]
        while queue:
            case = queue.pop(0)
            for sampler in _samplers(case):
                dit = Recorder(case.dit(engine), case)
                ends[sampler, case.name] = rollouts.roll(dit, case, sampler, self.steps, progress.advance)
                if sampler == PING_PONG:
                    result.rows += dit.rows
                    result.velocities["reference"] += dit.velocities
            if case in texts:
                more = [inpaint_case(case, ends[PING_PONG, case.name]), guided_case(case)]
                result.cases += more
                queue += more

    def _record(self, engine: GraphEngine, result: StudyResult, rows: Sequence[StepInput], progress: Progress) -> None:
        for row in rows:
            result.rows.append(row)
            result.velocities["reference"].append(rollouts.step(engine, row))
            progress.advance()

    def _ends(self, engine: GraphEngine, result: StudyResult, progress: Progress, perturbation: float = 0.0) -> Ends:
        return {
            (sampler, case.name): rollouts.roll(
                case.dit(engine), case, sampler, self.steps, progress.advance, perturbation
            )
            for case in result.cases
            for sampler in _samplers(case)
        }

    def _batches(self, engine: GraphEngine, result: StudyResult, progress: Progress) -> dict[int, np.ndarray]:
        rows = [result.rows[index] for index in result.batch_rows]
        velocities = {}
        for size in range(2, len(rows) + 1):
            velocities[size] = rollouts.batch(engine, rows[:size])
            progress.advance(size)
        return velocities

    def _forwards(self, cases: Sequence[Case], rows: Sequence[StepInput]) -> int:
        """Return the number of DiT steps of a run, the total of the progress display."""
        texts = sum(case.kind == TEXT for case in cases)
        extra = 2 * min(self.extra, texts)
        ping_pongs, eulers = len(cases) + extra, texts
        sets = 3 + (self.control is not None)
        singles = ping_pongs * self.steps + 2 * len(rows)
        batches = 2 * sum(range(2, min(shapes.MAX_BATCH, len(cases) * self.steps) + 1))
        return sets * (ping_pongs + eulers) * self.steps + singles + batches

    def decode(self, decoder: GraphEngine, result: StudyResult) -> None:
        """Decode every ping-pong generation with one decoder for all DiTs, into fp32 sounds (samples, 2)."""
        import torch

        with Progress("sounds", len(result.latents) * len(result.cases), "sounds") as progress:
            for name, ends in result.latents.items():
                sounds = result.sounds[name] = {}
                for case in result.cases:
                    with torch.inference_mode():
                        samples = autoencoder.decode(decoder, torch.from_numpy(ends[PING_PONG, case.name]))
                        sounds[case.name] = autoencoder.finish(samples, case.seconds).numpy()
                    progress.advance(note=f"{name}, {case.name}")


def _fp16_collision(engine: GraphEngine, result: StudyResult) -> dict[str, list[float]]:
    return fp16_collision.velocity_differences(engine, result.rows[result.batch_rows[0]])


def _samplers(case: Case) -> tuple[str, ...]:
    """Return the samplers of a case: ping-pong for all, Euler for text alone, which published figures are of."""
    return SAMPLERS if case.kind == TEXT else (PING_PONG,)


def _spread_rows(rows: Sequence[StepInput]) -> list[int]:
    """Return up to 8 indices of unguided rows of one length, spread over cases and noise levels."""
    fit = [index for index, row in enumerate(rows) if row.null is None and row.frames == rows[0].frames]
    count = min(shapes.MAX_BATCH, len(fit))
    return [fit[int(at)] for at in np.linspace(0, len(fit) - 1, count).round()] if count else []


def step_distances(result: StudyResult, levels: Sequence[float]) -> list[dict[str, Distance]]:
    """Return distances between reference and candidate for every row: of velocity, denoised x - sigma v, Euler step x +
    dt v.

    dt goes to the next of `levels` (sigmas) below the row's sigma.
    """
    distances = []
    for row, first, second in zip(
        result.rows, result.velocities["reference"], result.velocities[CANDIDATE], strict=True
    ):
        x, sigma = row.x.numpy(), np.float32(row.sigma)
        below = np.float32(max((level for level in levels if level < row.sigma - 1e-6), default=0.0))
        weights = {"velocity": (0, 1), "denoised": (1, -sigma), "euler": (1, below - sigma)}  # of x and of v
        distances.append({name: distance(a * x + b * first, a * x + b * second) for name, (a, b) in weights.items()})
    return distances


def batch_distances(result: StudyResult) -> dict[str, dict[int, list[Distance]]]:
    """Return distances of each row of a batch from the same row alone, by DiT and batch size."""
    distances: dict[str, dict[int, list[Distance]]] = {}
    for name, by_size in result.batches.items():
        serial = [result.velocities[name][index] for index in result.batch_rows]
        distances[name] = {
            size: [distance(alone[0], row) for alone, row in zip(serial, made, strict=False)]
            for size, made in by_size.items()
        }
    return distances
