"""Whole generations: ping-pong and Euler, each with noise that all DiTs share, and the steps that they pass through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from sa3_trt_core import shapes
from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines.base import Closing, DiTVelocity
from sa3_trt_core.sampling import schedule
from sa3_trt_core.sampling.sampler import ping_pong, row_noise
from sa3_validation.cases import Case, Row
from sa3_validation.perturbation import Perturbed, off_by

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import GraphEngine, VelocityEngine

PING_PONG, EULER = "ping_pong", "euler"
SAMPLERS = (PING_PONG, EULER)
PERTURBATION = 1e-3  # relative L2 of what is added to x, at every step
OTHER_SEEDS = 10**6  # of perturbations: apart from those of the noise
Tell = Callable[[], None]


class Recorder(Closing):
    """A DiT that keeps every step it is asked for, and its answer."""

    def __init__(self, dit: VelocityEngine, case: Case) -> None:
        self._dit, self._case = dit, case
        self.rows: list[Row] = []
        self.velocities: list[np.ndarray] = []

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The DiT's own velocity."""
        found = self._dit.velocity(x, t, cond)
        case = self._case
        self.rows.append(Row(case.name, case.prompt, case.kind, x, t, cond, case.null))
        self.velocities.append(found.numpy())
        return found


def roll(
    dit: VelocityEngine, case: Case, sampler: str, steps: int, tell: Tell, perturbation: float = 0.0,
    start_only: bool = False,
) -> np.ndarray:  # fmt: skip
    """The final latent (1, 256, L) fp32 of a case; with a perturbation, of a DiT that reads x off by that share.

    `start_only` perturbs the start instead of every step's x.
    """
    import torch

    directions = row_noise([OTHER_SEEDS + case.seed], shapes.LATENT_CHANNELS, case.frames)
    if perturbation and start_only:
        case = replace(case, start=off_by(next(case.noise()), perturbation, next(directions)))
    elif perturbation:
        dit = Perturbed(dit, perturbation, directions)
    levels = schedule.sigmas(steps)
    with torch.inference_mode():
        if sampler == PING_PONG:
            found = ping_pong(dit, case.noise(), levels, case.cond, lambda *_: tell())
        else:
            found = euler(dit, next(case.noise()), levels, case.cond, tell)
    return found.numpy()


def euler(dit: VelocityEngine, start: Tensor, levels: Tensor, cond: Conditioning, tell: Tell) -> Tensor:
    """Latents (B, C, L) from a start at levels[0]: x + (s_{i+1} - s_i) v, no noise after the start."""
    x = start
    for now, after in pairwise(levels):
        x = x + (after - now) * dit.velocity(x, now.expand(x.shape[0]).contiguous(), cond)
        tell()
    return x


def step(engine: GraphEngine, row: Row) -> np.ndarray:
    """Velocity (1, 256, L) fp32 of one row."""
    import torch

    with torch.inference_mode():
        return row.dit(engine).velocity(row.x, row.t, row.cond).numpy()


def batch(engine: GraphEngine, rows: Sequence[Row]) -> np.ndarray:
    """Velocities (B, 256, L) fp32 of rows of one length without guidance, in one forward."""
    import torch

    conds = [vars(row.cond) for row in rows]
    cond = Conditioning(**{name: torch.cat([one[name] for one in conds]) for name in conds[0]})
    x, t = torch.cat([row.x for row in rows]), torch.cat([row.t for row in rows])
    with torch.inference_mode():
        return DiTVelocity(engine).velocity(x, t, cond).numpy()
