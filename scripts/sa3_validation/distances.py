"""How far one array is from another, and how such figures are spread over many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of two arrays taken as vectors; NaN when one has no length, which no gate lets pass."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.vdot(first, second) / length) if length else float("nan")


def relative(reference: np.ndarray, candidate: np.ndarray) -> float:
    """||candidate - reference|| / ||reference||; NaN when the reference has no length."""
    length = float(np.linalg.norm(reference))
    return float(np.linalg.norm(candidate - reference) / length) if length else float("nan")


@dataclass(frozen=True)
class Apart:
    """One row: cosine, relative L2, and the length of the candidate's part along the reference as a share of it.

    `gain` is <candidate, reference> / <reference, reference>: 1 is right, and a scale that is off shows in it first.
    """

    cosine: float
    relative: float
    gain: float


def apart(reference: np.ndarray, candidate: np.ndarray) -> Apart:
    """How far two arrays of one shape are apart, in fp64; exactly (1, 0, 1) when they are equal to the bit."""
    if np.array_equal(reference, candidate):
        return Apart(1.0, 0.0, 1.0)
    wide = reference.astype(np.float64), candidate.astype(np.float64)
    power = float(np.vdot(wide[0], wide[0]))
    gain = float(np.vdot(*wide) / power) if power else float("nan")
    return Apart(cosine(*wide), relative(*wide), gain)


@dataclass(frozen=True)
class Spread:
    """Figures over rows: the worst, the one that 5 % are no better than, median and mean. `n` may be 0, all NaN."""

    n: int
    worst: float
    p5: float
    median: float
    mean: float


def spread(values: Sequence[float], best: float) -> Spread:
    """The spread of figures whose good end is `best`: inf for the more the better, -inf for the less, else a target.

    With a target (a gain of 1) the worst is the furthest from it. NaN counts as the worst there is.
    """
    found = np.asarray(values, np.float64)
    if not found.size or np.isnan(found).any():
        return Spread(len(found), *(float("nan"),) * 4)
    badness = -found if best == np.inf else found if best == -np.inf else np.abs(found - best)
    order = np.argsort(badness, kind="stable")
    rank = int(np.ceil(0.95 * len(found))) - 1  # of the figure that 5 % are no better than
    return Spread(
        len(found), float(found[order[-1]]), float(found[order[rank]]), float(np.median(found)), float(found.mean())
    )
