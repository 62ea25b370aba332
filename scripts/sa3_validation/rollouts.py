"""Run whole generations with ping-pong and Euler, each with noise shared by all DiTs, and record their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from sa3_trt_core import shapes
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines.base import Closeable, DiTVelocity
from sa3_trt_core.sampling import schedule
from sa3_trt_core.sampling.sampler import ping_pong, row_noise
from sa3_validation.cases import Case, StepInput
from sa3_validation.perturbation import Perturbed, perturb

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine, VelocityEngine

PING_PONG, EULER = "ping_pong", "euler"
SAMPLERS = (PING_PONG, EULER)
PERTURBATION = 1e-3  # relative L2 of the perturbation of x, at every step
PERTURBATION_SEED_OFFSET = 10**6  # keeps seeds of perturbations distinct from those of the noise
OnStep = Callable[[], None]


class Recorder(Closeable):
    """DiT wrapper that records the inputs and the velocity of every step."""

    def __init__(self, dit: VelocityEngine, case: Case) -> None:
        self._dit, self._case = dit, case
        self.rows: list[StepInput] = []
        self.velocities: list[np.ndarray] = []

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the DiT's velocity (B, 256, L) and record it with its inputs."""
        velocity = self._dit.velocity(x, t, cond)
        case = self._case
        self.rows.append(StepInput(case.name, case.prompt, case.kind, x, t, cond, case.null))
        self.velocities.append(velocity.numpy())
        return velocity


def roll(
    dit: VelocityEngine, case: Case, sampler: str, steps: int, on_step: OnStep, perturbation: float = 0.0,
    start_only: bool = False,
) -> np.ndarray:  # fmt: skip
    """Return the final latent (1, 256, L) fp32 of a case.

    `perturbation` is the relative L2 of a random change of x at every step; `start_only` changes the start alone.
    """
    import torch

    directions = row_noise([PERTURBATION_SEED_OFFSET + case.seed], shapes.LATENT_CHANNELS, case.frames)
    if perturbation and start_only:
        case = replace(case, start=perturb(next(case.noise()), perturbation, next(directions)))
    elif perturbation:
        dit = Perturbed(dit, perturbation, directions)
    levels = schedule.sigmas(steps)
    with torch.inference_mode():
        if sampler == PING_PONG:
            latent = ping_pong(dit, case.noise(), levels, case.cond, lambda *_: on_step())
        else:
            latent = euler(dit, next(case.noise()), levels, case.cond, on_step)
    return latent.numpy()


def euler(dit: VelocityEngine, start: Tensor, levels: Tensor, cond: Conditioning, on_step: OnStep) -> Tensor:
    """Integrate latents (B, C, L) from a start at levels[0] with Euler steps x + (s_{i+1} - s_i) v; adds no noise."""
    x = start
    for now, after in pairwise(levels):
        x = x + (after - now) * dit.velocity(x, now.expand(x.shape[0]).contiguous(), cond)
        on_step()
    return x


def step(engine: GraphEngine, row: StepInput) -> np.ndarray:
    """Return the velocity (1, 256, L) fp32 of one row."""
    import torch

    with torch.inference_mode():
        return row.dit(engine).velocity(row.x, row.t, row.cond).numpy()


def batch(engine: GraphEngine, rows: Sequence[StepInput]) -> np.ndarray:
    """Return the velocities (B, 256, L) fp32 of unguided rows of one length, computed in one forward."""
    import torch

    conds = [vars(row.cond) for row in rows]
    cond = Conditioning(**{name: torch.cat([row_cond[name] for row_cond in conds]) for name in conds[0]})
    x, t = torch.cat([row.x for row in rows]), torch.cat([row.t for row in rows])
    with torch.inference_mode():
        return DiTVelocity(engine).velocity(x, t, cond).numpy()
