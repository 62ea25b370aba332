"""Distances between arrays and their distribution over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Return the cosine of two arrays taken as vectors; NaN, which fails every gate, when one has length 0."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.vdot(first, second) / length) if length else float("nan")


def relative(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return ||candidate - reference|| / ||reference||; NaN when the reference has length 0."""
    length = float(np.linalg.norm(reference))
    return float(np.linalg.norm(candidate - reference) / length) if length else float("nan")


@dataclass(frozen=True)
class Distance:
    """Distance of one row from its reference: cosine, relative L2 and gain.

    `gain` is <candidate, reference> / <reference, reference>: 1 is exact, and a wrong scale shows in it first.
    """

    cosine: float
    relative: float
    gain: float


def distance(reference: np.ndarray, candidate: np.ndarray) -> Distance:
    """Return the distance of two arrays of one shape, computed in fp64; exactly (1, 0, 1) for equal bits."""
    if np.array_equal(reference, candidate):
        return Distance(1.0, 0.0, 1.0)
    wide = reference.astype(np.float64), candidate.astype(np.float64)
    power = float(np.vdot(wide[0], wide[0]))
    gain = float(np.vdot(*wide) / power) if power else float("nan")
    return Distance(cosine(*wide), relative(*wide), gain)


@dataclass(frozen=True)
class Spread:
    """Distribution of a figure over n rows: worst, 5 % from the worst end, median and mean. All NaN if n = 0."""

    n: int
    worst: float
    p5: float
    median: float
    mean: float


def spread(values: Sequence[float], best: float) -> Spread:
    """Return the distribution of figures whose best value is `best`: inf, -inf, or a target.

    With a target (a gain of 1) the worst is the furthest from it. NaN counts as the worst value.
    """
    figures = np.asarray(values, np.float64)
    if not figures.size or np.isnan(figures).any():
        return Spread(len(figures), *(float("nan"),) * 4)
    badness = -figures if best == np.inf else figures if best == -np.inf else np.abs(figures - best)
    order = np.argsort(badness, kind="stable")
    rank = int(np.ceil(0.95 * len(figures))) - 1  # 5 % of the figures are at least this bad
    return Spread(
        len(figures),
        float(figures[order[-1]]),
        float(figures[order[rank]]),
        float(np.median(figures)),
        float(figures.mean()),
    )
