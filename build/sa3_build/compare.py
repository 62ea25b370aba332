"""How far one DiT is from another: the denoised latent, per sigma, on calibration rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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


def parity_by_sigma(
    reference: GraphEngine, candidate: GraphEngine, rows: Iterable[Mapping[str, np.ndarray]]
) -> list[SigmaParity]:
    """Run both DiTs on every row and compare the denoised latents, highest sigma first.

    The denoised latent is what a ping-pong step keeps; x + dt v is nearly blind at sigma ~ 1, where dt is -0.006.
    """
    import torch

    found: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        inputs = {key: torch.from_numpy(np.array(value)) for key, value in row.items()}
        sigma = float(row["t"][0])
        first, second = (
            row["x"].astype(np.float64) - sigma * engine.run(inputs)["velocity"].cpu().numpy().astype(np.float64)
            for engine in (reference, candidate)
        )
        found[round(sigma, 6)].append((cosine(first, second), relative(first, second)))
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
