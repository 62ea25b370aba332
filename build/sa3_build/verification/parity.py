"""Compare two DiTs by the denoised latent, per sigma and kind of row, on calibration rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_build.quantization.workspace import Workspace
from sa3_trt_core.artifacts.calibration_layout import KINDS
from sa3_trt_core.artifacts.calibration_set import tensors
from sa3_trt_core.console import Progress, table
from sa3_trt_core.errors import GateError
from sa3_validation.distances import cosine, relative

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


@dataclass(frozen=True)
class KindParity:
    """Agreement of the denoised x - sigma v over the rows of one kind."""

    kind: str
    rows: int
    worst_cosine: float
    mean_cosine: float
    worst_relative: float


def require_parity(build: Workspace) -> Mapping[str, Any]:
    """Return the parity of the result with the clean graph on the parity rows.

    The reference is the clean graph, not the source: errors of a source of another recipe are corrected in it. Raises
    GateError when a row's cosine is under the settings' limit.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    rows = build.parity_rows
    denoised = []
    with Progress("parity with the source graph", 2 * rows.rows) as progress:
        for path in (build.clean, build.result):
            with OnnxRuntimeEngine(path, low_memory=True) as engine:
                denoised.append(denoise_rows(engine, progress.counted(rows)))
    parity = parity_by_sigma(*denoised)
    worst = min(p.worst_cosine for p in parity)
    limit = max(build.settings.min_cosine, build.settings.target_cosine or 0.0)
    if not worst >= limit:
        raise GateError(
            f"worst denoised cosine {worst:.6f} (required >= {limit:g}); nothing was written",
            "calibrate on more prompts, or lower the limit if you know why (--min-cosine, --target-cosine)",
            table(PARITY_HEADER, parity_rows(parity)),
        )
    kinds = parity_by_kind(denoised[0], denoised[1], rows.kinds())
    return {"parity": [asdict(p) for p in parity], "by_kind": [asdict(p) for p in kinds], "worst": worst}


def denoise_rows(engine: GraphEngine, rows: Iterable[Mapping[str, np.ndarray]]) -> list[tuple[float, np.ndarray]]:
    """Return sigma and denoised latent x - sigma v (1, 256, L) of every row, through one DiT.

    Takes one engine, so that a comparison never has two DiTs in memory. The denoised latent is what a ping-pong step
    uses; x + dt v is insensitive near sigma = 1, where dt is -0.006.
    """
    denoised = []
    for row in rows:
        sigma = float(row["t"][0])
        denoised.append((sigma, row["x"] - np.float32(sigma) * engine.run(tensors(row))["velocity"].cpu().numpy()))
    return denoised


def parity_by_sigma(
    reference: Sequence[tuple[float, np.ndarray]], candidate: Sequence[tuple[float, np.ndarray]]
) -> list[SigmaParity]:
    """Compare the denoised latents of two DiTs on the same rows, highest sigma first."""
    by_sigma: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for (sigma, _), pair in zip(reference, _pairs(reference, candidate), strict=True):
        by_sigma[round(sigma, 6)].append(pair)
    return [SigmaParity(sigma, len(pairs), *_put_together(pairs)) for sigma, pairs in sorted(by_sigma.items())[::-1]]


def parity_by_kind(
    reference: Sequence[tuple[float, np.ndarray]], candidate: Sequence[tuple[float, np.ndarray]], kinds: Sequence[str]
) -> list[KindParity]:
    """Compare the denoised latents by the kind of row, in the order of `KINDS`; `kinds` has one entry per row."""
    by_kind: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for kind, pair in zip(kinds, _pairs(reference, candidate), strict=True):
        by_kind[kind].append(pair)
    return [KindParity(kind, len(by_kind[kind]), *_put_together(by_kind[kind])) for kind in KINDS if kind in by_kind]


def _pairs(
    reference: Sequence[tuple[float, np.ndarray]], candidate: Sequence[tuple[float, np.ndarray]]
) -> list[tuple[float, float]]:
    """Return cosine and relative L2 of every row."""
    pairs = []
    for (sigma, first), (candidate_sigma, second) in zip(reference, candidate, strict=True):
        assert sigma == candidate_sigma, "the two DiTs were run on different rows"
        as_fp64 = first.astype(np.float64), second.astype(np.float64)
        pairs.append((cosine(*as_fp64), relative(*as_fp64)))
    return pairs


def _put_together(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return worst and mean cosine, and worst relative L2."""
    return min(c for c, _ in pairs), float(np.mean([c for c, _ in pairs])), max(r for _, r in pairs)


def parity_rows(parity: Sequence[SigmaParity | KindParity]) -> list[list[str]]:
    """Return the table cells: sigma or kind, rows, worst and mean cosine, worst relative L2."""
    return [
        [
            p.kind if isinstance(p, KindParity) else f"{p.sigma:.4f}", str(p.rows), f"{p.worst_cosine:.6f}",
            f"{p.mean_cosine:.6f}", f"{p.worst_relative:.2e}",
        ]
        for p in parity
    ]  # fmt: skip


PARITY_HEADER = ("sigma", "rows", "worst cosine", "mean cosine", "worst rel L2")
KIND_HEADER = ("kind of row", *PARITY_HEADER[1:])
