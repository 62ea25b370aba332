"""Choice of 16-bit layers: effects of single quantizer groups, their order, the frontier and its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_build.quantization.switchable_graph import QuantizerGroup
from sa3_trt_core.artifacts import files

PLOT_SUFFIX = ".frontier.png"
HEADER = ("16-bit linears", "FP8 share", "weight bytes", "predicted worst", "measured worst", "at sigma")


@dataclass(frozen=True)
class Effect:
    """Effect of quantising one group alone on the denoised latent: squared relative L2 error by sigma."""

    group: QuantizerGroup
    kind: str
    layer: int | None
    squared: Mapping[float, float]


@dataclass(frozen=True)
class Point:
    """Configuration with the first `kept` groups in 16 bits; `measured` is the worst cosine by sigma, if it was run."""

    kept: int
    fp16_linears: int
    fp8_share: float
    weight_bytes: int
    predicted: float
    measured: Mapping[float, float] | None = None

    @property
    def worst(self) -> tuple[float, float] | None:
        """The worst measured cosine and its sigma; None if not measured."""
        return min((cosine, sigma) for sigma, cosine in self.measured.items()) if self.measured else None


def greedy_order(effects: Sequence[Effect]) -> list[Effect]:
    """Return the order in which groups go to 16 bits: highest error per multiply-add at the worst sigma first.

    The error is the squared one; the worst sigma is determined again after each group. Errors of different layers are
    nearly orthogonal, so their squares add up; the error of this assumption shows when whole configurations are
    measured. Ties go to the earlier layer.
    """
    remaining, order = list(effects), []
    while remaining:
        sigma = max(remaining[0].squared, key=lambda level: (sum(effect.squared[level] for effect in remaining), level))
        best = max(
            range(len(remaining)),
            key=lambda index: (remaining[index].squared[sigma] / remaining[index].group.macs, -index),
        )
        order.append(remaining.pop(best))
    return order


def predicted_points(order: Sequence[Effect], macs_elsewhere: int, weights: str) -> list[Point]:
    """Return every prefix of the order, from none kept to all but one: FP8 share, bytes, predicted worst cosine.

    1 - cosine is half the squared relative error if errors are small and orthogonal to the latent. Bytes are those of
    the weights that every token uses: one per element in FP8 if stored as codes, else two.
    """
    total = sum(effect.group.macs for effect in order) + macs_elsewhere
    points = []
    for kept in range(len(order)):
        quantised = order[kept:]
        macs = sum(effect.group.macs for effect in quantised)
        error = max(sum(effect.squared[sigma] for effect in quantised) for sigma in order[0].squared)
        elements = 2 * total - (macs if weights == "fp8" else 0)
        fp16_linears = sum(len(effect.group.linears) for effect in order[:kept])
        points.append(Point(kept, fp16_linears, macs / total, elements, 1 - error / 2))
    return points


def table_rows(points: Sequence[Point]) -> list[list[str]]:
    """Return the table cells of the measured points, fewest kept first."""
    cells = []
    for point in points:
        if point.worst is not None:
            cosine, sigma = point.worst
            share, size = f"{point.fp8_share:.1%}", str(point.weight_bytes)
            cells.append(
                [str(point.fp16_linears), share, size, f"{point.predicted:.6f}", f"{cosine:.6f}", f"{sigma:.4f}"]
            )
    return cells


def document(order: Sequence[Effect], points: Sequence[Point], target: float, chosen: int | None) -> dict[str, Any]:
    """Return the frontier as a JSON document; each point adds one group to those of the points before it."""
    entries = []
    for point in points:
        added = order[point.kept - 1] if point.kept else None
        entries.append(
            {
                "adds": [linear.node for linear in added.group.linears] if added else [],
                "kind": added.kind if added else None,
                "layer": added.layer if added else None,
                "squared_error": _by_sigma(added.squared) if added else None,
                "fp16_linears": point.fp16_linears,
                "fp8_share": point.fp8_share,
                "weight_bytes": point.weight_bytes,
                "predicted_worst_cosine": point.predicted,
                "worst_cosine": _by_sigma(point.measured) if point.measured else None,
            }
        )
    return {"target": target, "chosen": chosen, "points": entries}


def plot(frontier: Mapping[str, Any], artefact: Path) -> Path:
    """Draw the frontier to a PNG beside its artefact, atomically; return its path."""
    path = artefact.with_name(artefact.name + PLOT_SUFFIX)
    with files.atomic_path(path) as temporary:
        draw(frontier, temporary)
    return path


def draw(frontier: Mapping[str, Any], path: Path) -> None:
    """Draw the frontier to a PNG: share in FP8 against 1 - worst cosine. Equal frontiers give equal bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = frontier["points"]
    share = [100 * point["fp8_share"] for point in points]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(share, [1 - point["predicted_worst_cosine"] for point in points], color="0.6", label="predicted")
    measured = [(100 * p["fp8_share"], 1 - min(p["worst_cosine"].values())) for p in points if p["worst_cosine"]]
    axes.plot([x for x, _ in measured], [y for _, y in measured], "o", label="measured")
    axes.axhline(1 - frontier["target"], color="C3", linestyle="--", label=f"target {frontier['target']:g}")
    if frontier["chosen"] is not None:
        axes.axvline(share[frontier["chosen"]], color="C2", linestyle=":", label="chosen")
    axes.set(xlabel="multiply-adds of a token in FP8 (%)", ylabel="1 - worst denoised cosine", yscale="log")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _by_sigma(values: Mapping[float, float]) -> dict[str, float]:
    return {f"{sigma:g}": values[sigma] for sigma in sorted(values, reverse=True)}
