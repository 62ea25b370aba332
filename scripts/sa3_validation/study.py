"""The comparison itself: one DiT after the other, one held at a time, over the same rows and noise; then the sound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sa3_trt_core import shapes
from sa3_trt_core.audio import autoencoder
from sa3_trt_core.console import Progress
from sa3_validation import fp16_collision, rollouts
from sa3_validation.cases import TEXT, Case, Row, guided, in_painted
from sa3_validation.distances import Apart, apart
from sa3_validation.models import Side
from sa3_validation.rollouts import PING_PONG, SAMPLERS, Recorder

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

CANDIDATE, PERTURBED, OTHER = "candidate", "perturbed", "other_kernels"  # what is compared with the reference
COMPARED = (CANDIDATE, PERTURBED, OTHER)
Ends = dict[tuple[str, str], np.ndarray]  # (sampler, case) -> final latent


@dataclass
class Found:
    """What the runs left. `latents` are the final ones by DiT ("reference" and COMPARED), sampler and case.

    `velocities` are those of every row; `batches` the velocities (B, 256, L) of the first B of `together` by DiT and B;
    `resolution` what resolution.answers gave, by DiT.
    """

    cases: list[Case]
    rows: list[Row] = field(default_factory=list)
    velocities: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"reference": [], CANDIDATE: []})
    latents: dict[str, Ends] = field(default_factory=dict)
    resolution: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    together: list[int] = field(default_factory=list)
    batches: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    sounds: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What is run: `extra` of the text cases are in-painted and guided too; `control` None leaves that control out."""

    reference: Side
    candidate: Side
    control: Side | None
    steps: int
    extra: int

    def run(self, cases: Sequence[Case], rows: Sequence[Row]) -> Found:
        """All DiTs in turn. `rows` are single steps beside those that the reference's own generations pass through."""
        found = Found(list(cases))
        with Progress("forwards", self._forwards(cases, rows), "forwards") as progress:
            with self.reference.open() as engine:
                self._generate_reference(engine, found, progress)
                self._record(engine, found, rows, progress)
                found.latents[PERTURBED] = self._ends(engine, found, progress, rollouts.PERTURBATION)
                found.together = _together(found.rows)
                found.batches["reference"] = self._batches(engine, found, progress)
                found.resolution["reference"] = fp16_collision.answers(engine, found.rows[found.together[0]])
            if self.control is not None:
                with self.control.open() as engine:
                    found.latents[OTHER] = self._ends(engine, found, progress)
            with self.candidate.open() as engine:
                for row in found.rows:
                    found.velocities[CANDIDATE].append(rollouts.step(engine, row))
                    progress.advance(note=f"{self.candidate.name}, steps")
                found.latents[CANDIDATE] = self._ends(engine, found, progress)
                found.batches[CANDIDATE] = self._batches(engine, found, progress)
                found.resolution[CANDIDATE] = fp16_collision.answers(engine, found.rows[found.together[0]])
        return found

    def _generate_reference(self, engine: GraphEngine, found: Found, progress: Progress) -> None:
        """The reference's generations, its steps recorded; in-painting and guided cases are made of the first texts."""
        ends = found.latents["reference"] = {}
        queue = list(found.cases)
        texts = [case for case in queue if case.kind == TEXT][: self.extra]
        while queue:
            case = queue.pop(0)
            for sampler in _samplers(case):
                dit = Recorder(case.dit(engine), case)
                ends[sampler, case.name] = rollouts.roll(dit, case, sampler, self.steps, progress.advance)
                if sampler == PING_PONG:
                    found.rows += dit.rows
                    found.velocities["reference"] += dit.velocities
            if case in texts:
                more = [in_painted(case, ends[PING_PONG, case.name]), guided(case)]
                found.cases += more
                queue += more

    def _record(self, engine: GraphEngine, found: Found, rows: Sequence[Row], progress: Progress) -> None:
        for row in rows:
            found.rows.append(row)
            found.velocities["reference"].append(rollouts.step(engine, row))
            progress.advance()

    def _ends(self, engine: GraphEngine, found: Found, progress: Progress, perturbation: float = 0.0) -> Ends:
        return {
            (sampler, case.name): rollouts.roll(
                case.dit(engine), case, sampler, self.steps, progress.advance, perturbation
            )
            for case in found.cases
            for sampler in _samplers(case)
        }

    def _batches(self, engine: GraphEngine, found: Found, progress: Progress) -> dict[int, np.ndarray]:
        rows = [found.rows[index] for index in found.together]
        made = {}
        for size in range(2, len(rows) + 1):
            made[size] = rollouts.batch(engine, rows[:size])
            progress.advance(size)
        return made

    def _forwards(self, cases: Sequence[Case], rows: Sequence[Row]) -> int:
        """How many steps are taken, for the progress."""
        texts = sum(case.kind == TEXT for case in cases)
        extra = 2 * min(self.extra, texts)
        ping_pongs, eulers = len(cases) + extra, texts
        sets = 3 + (self.control is not None)
        singles = ping_pongs * self.steps + 2 * len(rows)
        batches = 2 * sum(range(2, min(shapes.MAX_BATCH, len(cases) * self.steps) + 1))
        return sets * (ping_pongs + eulers) * self.steps + singles + batches

    def decode(self, decoder: GraphEngine, found: Found) -> None:
        """The sound of every ping-pong generation, through one decoder for all: fp32 (samples, 2)."""
        import torch

        with Progress("sounds", len(found.latents) * len(found.cases), "sounds") as progress:
            for name, ends in found.latents.items():
                sounds = found.sounds[name] = {}
                for case in found.cases:
                    with torch.inference_mode():
                        samples = autoencoder.decode(decoder, torch.from_numpy(ends[PING_PONG, case.name]))
                        sounds[case.name] = autoencoder.finish(samples, case.seconds).numpy()
                    progress.advance(note=f"{name}, {case.name}")


def _samplers(case: Case) -> tuple[str, ...]:
    """Euler is run on text alone: what it is for, beside published figures, is no more than that."""
    return SAMPLERS if case.kind == TEXT else (PING_PONG,)


def _together(rows: Sequence[Row]) -> list[int]:
    """Up to 8 rows of one length without guidance, spread over cases and noise levels."""
    fit = [index for index, row in enumerate(rows) if row.null is None and row.frames == rows[0].frames]
    count = min(shapes.MAX_BATCH, len(fit))
    return [fit[int(at)] for at in np.linspace(0, len(fit) - 1, count).round()] if count else []


def steps_apart(found: Found, levels: Sequence[float]) -> list[dict[str, Apart]]:
    """Of every row: how far the velocity, the denoised x - sigma v, and the Euler step x + dt v are apart.

    dt goes to the next of `levels` below the row's sigma.
    """
    apart_rows = []
    for row, first, second in zip(found.rows, found.velocities["reference"], found.velocities[CANDIDATE], strict=True):
        x, sigma = row.x.numpy(), np.float32(row.sigma)
        below = np.float32(max((level for level in levels if level < row.sigma - 1e-6), default=0.0))
        weights = {"velocity": (0, 1), "denoised": (1, -sigma), "euler": (1, below - sigma)}  # of x and of v
        apart_rows.append({name: apart(a * x + b * first, a * x + b * second) for name, (a, b) in weights.items()})
    return apart_rows


def batches_apart(found: Found) -> dict[str, dict[int, list[Apart]]]:
    """By DiT and B: how far each row of a batch is from the same row alone."""
    result: dict[str, dict[int, list[Apart]]] = {}
    for name, by_size in found.batches.items():
        serial = [found.velocities[name][index] for index in found.together]
        result[name] = {
            size: [apart(alone[0], row) for alone, row in zip(serial, made, strict=False)]
            for size, made in by_size.items()
        }
    return result
