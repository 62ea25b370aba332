"""Perturb the x of a DiT by a fixed relative L2: the control for comparing generations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sa3_trt_core.engines.base import Closeable

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.conditioning import Conditioning
    from sa3_trt_core.engines.base import VelocityEngine


class Perturbed(Closeable):
    """DiT wrapper that adds a perturbation of fixed relative L2 to x, in a new random direction at every step.

    It does not close the DiT.
    """

    def __init__(self, dit: VelocityEngine, size: float, directions: Iterator[Tensor]) -> None:
        self._dit, self._size, self._directions = dit, size, directions

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the velocity (B, C, L) of the perturbed x."""
        return self._dit.velocity(perturb(x, self._size, next(self._directions)), t, cond)


def perturb(x: Tensor, size: float, direction: Tensor) -> Tensor:
    """Return x (B, C, L) plus `direction` (same shape) scaled to the relative L2 `size`."""
    return x + direction * (size * x.norm() / direction.norm())


def with_start(start: Tensor, noise: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield `start`, then the draws of `noise` after its first one."""
    next(noise)
    yield start
    yield from noise
