"""How far one DiT is from another: the denoised latent, per sigma, on calibration rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sa3_build.calib import CalibrationSet, ChosenRows, tensors

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine


@dataclass(frozen=True)
class SigmaParity:
    """Agreement of the denoised x - sigma v at one sigma, over rows."""

    sigma: float
    rows: int
    worst_cosine: float
    mean_cosine: float
    worst_relative: float


def denoise_rows(engine: GraphEngine, rows: Iterable[Mapping[str, np.ndarray]]) -> list[tuple[float, np.ndarray]]:
    """Sigma and denoised latent x - sigma v (1, 256, L) of every row, through one DiT.

    One engine at a time, so that a comparison never holds two DiTs in memory. The denoised latent is what a ping-pong
    step keeps; x + dt v is nearly blind at sigma ~ 1, where dt is -0.006.
    """
    found = []
    for row in rows:
        sigma = float(row["t"][0])
        found.append((sigma, row["x"] - np.float32(sigma) * engine.run(tensors(row))["velocity"].cpu().numpy()))
    return found


def parity_by_sigma(
    reference: Sequence[tuple[float, np.ndarray]], candidate: Sequence[tuple[float, np.ndarray]]
) -> list[SigmaParity]:
    """Compare the denoised latents of two DiTs on the same rows, highest sigma first."""
    found: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for (sigma, first), (other, second) in zip(reference, candidate, strict=True):
        assert sigma == other, "the two DiTs were run on different rows"
        wide = first.astype(np.float64), second.astype(np.float64)
        found[round(sigma, 6)].append((cosine(*wide), relative(*wide)))
    return [
        SigmaParity(
            sigma,
            len(pairs),
            min(c for c, _ in pairs),
            float(np.mean([c for c, _ in pairs])),
            max(r for _, r in pairs),
        )
        for sigma, pairs in sorted(found.items(), reverse=True)
    ]


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of two arrays taken as vectors; NaN when one has no length, which no gate lets pass."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.vdot(first, second) / length) if length else float("nan")


def relative(reference: np.ndarray, candidate: np.ndarray) -> float:
    """||candidate - reference|| / ||reference||."""
    length = float(np.linalg.norm(reference))
    return float(np.linalg.norm(candidate - reference) / length) if length else float("nan")


def parity_rows(parity: Sequence[SigmaParity]) -> list[list[str]]:
    """Table cells: sigma, rows, worst and mean cosine, worst relative L2."""
    return [
        [f"{p.sigma:.4f}", str(p.rows), f"{p.worst_cosine:.6f}", f"{p.mean_cosine:.6f}", f"{p.worst_relative:.2e}"]
        for p in parity
    ]


PARITY_HEADER = ("sigma", "rows", "worst cosine", "mean cosine", "worst rel L2")


def parity_selection(sigmas: list[float], limit: int) -> set[int]:
    """Which rows the parity runs on: at most `limit`, spread over the set, the same number at every sigma."""
    by_sigma: dict[float, list[int]] = {}
    for index, sigma in enumerate(sigmas):
        by_sigma.setdefault(round(sigma, 6), []).append(index)
    each = max(1, limit // len(by_sigma))
    chosen: set[int] = set()
    for rows in by_sigma.values():
        step = max(1, len(rows) // each)
        chosen.update(rows[::step][:each])
    return chosen


def parity_rows_of(calibration: CalibrationSet, limit: int) -> ChosenRows:
    """The rows that the parity runs on."""
    return ChosenRows(calibration, frozenset(parity_selection(calibration.sigmas(), limit)))
