"""The control of every comparison of generations: a DiT that reads an x which is slightly off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sa3_trt_core.engines.base import Closing

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.conditioning import Conditioning
    from sa3_trt_core.engines.base import VelocityEngine


class Perturbed(Closing):
    """A DiT that reads an x off by a fixed share of its length, in a fresh direction at every step.

    Does not close the DiT.
    """

    def __init__(self, dit: VelocityEngine, size: float, directions: Iterator[Tensor]) -> None:
        self._dit, self._size, self._directions = dit, size, directions

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Velocity of the perturbed x."""
        return self._dit.velocity(off_by(x, self._size, next(self._directions)), t, cond)


def off_by(x: Tensor, size: float, direction: Tensor) -> Tensor:
    """x (B, C, L) and `size` of its length along a direction of that shape."""
    return x + direction * (size * x.norm() / direction.norm())


def started(start: Tensor, noise: Iterator[Tensor]) -> Iterator[Tensor]:
    """The draws of a generation that begins at `start`: the first draw of `noise` is passed over."""
    next(noise)
    yield start
    yield from noise
