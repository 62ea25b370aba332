"""What a choice of 16-bit products costs and gives: effects of single units, their order, the frontier and its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_build.quantization.switchable_graph import Unit
from sa3_trt_core.artifacts import files

PLOT_SUFFIX = ".frontier.png"
HEADER = ("16-bit products", "FP8 share", "weight bytes", "predicted worst", "measured worst", "at sigma")


@dataclass(frozen=True)
class Effect:
    """What one unit alone, quantised, does to the denoised latent: squared relative L2 error by sigma."""

    unit: Unit
    kind: str
    layer: int | None
    squared: Mapping[float, float]


@dataclass(frozen=True)
class Point:
    """The first units of the order kept in 16 bits; `measured` is the worst cosine by sigma where it was run."""

    kept: int
    products: int
    fp8_share: float
    weight_bytes: int
    predicted: float
    measured: Mapping[float, float] | None = None

    @property
    def worst(self) -> tuple[float, float] | None:
        """The worst measured cosine and its sigma."""
        return min((cosine, sigma) for sigma, cosine in self.measured.items()) if self.measured else None


def greedy_order(effects: Sequence[Effect]) -> list[Effect]:
    """The order in which units go to 16 bits: at the sigma that is then the worst, most squared error a multiply-add.

    Errors of different products are nearly orthogonal, so squares add up; what that leaves out, measurement of whole
    configurations has to find. Ties go to the earlier product.
    """
    left, order = list(effects), []
    while left:
        sigma = max(left[0].squared, key=lambda one: (sum(effect.squared[one] for effect in left), one))
        best = max(range(len(left)), key=lambda index: (left[index].squared[sigma] / left[index].unit.macs, -index))
        order.append(left.pop(best))
    return order


def predicted_points(order: Sequence[Effect], macs_elsewhere: int, weights: str) -> list[Point]:
    """Every prefix of the order, from nothing kept to all but one: share, bytes, predicted worst cosine.

    1 - cosine is half the squared relative error where errors are small and orthogonal to the latent. Bytes are those
    of the weights of tokens: one an element in FP8 when they are stored so, else two.
    """
    total = sum(effect.unit.macs for effect in order) + macs_elsewhere
    points = []
    for kept in range(len(order)):
        quantised = order[kept:]
        macs = sum(effect.unit.macs for effect in quantised)
        error = max(sum(effect.squared[sigma] for effect in quantised) for sigma in order[0].squared)
        elements = 2 * total - (macs if weights == "fp8" else 0)
        products = sum(len(effect.unit.products) for effect in order[:kept])
        points.append(Point(kept, products, macs / total, elements, 1 - error / 2))
    return points


def table_rows(points: Sequence[Point]) -> list[list[str]]:
    """Cells of the points that were measured, fewest kept first."""
    cells = []
    for point in points:
        if point.worst is not None:
            cosine, sigma = point.worst
            share, size = f"{point.fp8_share:.1%}", str(point.weight_bytes)
            cells.append([str(point.products), share, size, f"{point.predicted:.6f}", f"{cosine:.6f}", f"{sigma:.4f}"])
    return cells


def document(order: Sequence[Effect], points: Sequence[Point], target: float, chosen: int | None) -> dict[str, Any]:
    """The frontier as JSON: each point adds one unit to the units of the points before it."""
    entries = []
    for point in points:
        added = order[point.kept - 1] if point.kept else None
        entries.append(
            {
                "adds": [product.node for product in added.unit.products] if added else [],
                "kind": added.kind if added else None,
                "layer": added.layer if added else None,
                "own squared error": _by_sigma(added.squared) if added else None,
                "fp16 products": point.products,
                "fp8 share": point.fp8_share,
                "weight bytes": point.weight_bytes,
                "predicted worst cosine": point.predicted,
                "worst cosine": _by_sigma(point.measured) if point.measured else None,
            }
        )
    return {"target": target, "chosen": chosen, "points": entries}


def plot(frontier: Mapping[str, Any], artefact: Path) -> Path:
    """Draw the frontier beside its artefact, whole or not at all; returns where."""
    path = artefact.with_name(artefact.name + PLOT_SUFFIX)
    with files.atomic_path(path) as temporary:
        draw(frontier, temporary)
    return path


def draw(frontier: Mapping[str, Any], path: Path) -> None:
    """The frontier as a PNG: share in FP8 against 1 - worst cosine; the same frontier gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = frontier["points"]
    share = [100 * point["fp8 share"] for point in points]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(share, [1 - point["predicted worst cosine"] for point in points], color="0.6", label="predicted")
    measured = [(100 * p["fp8 share"], 1 - min(p["worst cosine"].values())) for p in points if p["worst cosine"]]
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
