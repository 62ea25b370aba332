"""Statistics of what enters the quantised products of a DiT, per activation and sigma: what FP8 has to survive."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3_build.graph import contract, io as graph_io
from sa3_build.quantization import amax as quantization_amax, scales as quantization_scales, selection
from sa3_build.quantization.layer_roles import KINDS, places
from sa3_build.quantization.streaming_stats import Statistics, Tally
from sa3_build.recipes.fp8 import input_digests
from sa3_build.recipes.fp8_inputs import require_half
from sa3_trt_core import shapes
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative, tensors
from sa3_trt_core.console import Progress
from sa3_trt_core.errors import ToolError

FORMAT = 1
FIGURES = ("worst amax", "median crest", "worst kurtosis", "least channel share", "worst underflow")
FETCHED_ELEMENTS = 1 << 27  # activations fetched at once, about: 256 MB of fp16


@dataclass(frozen=True)
class Activation:
    """The input of one or more quantised products, and its statistics at every sigma, highest first."""

    name: str
    kind: str
    tensor: str
    products: tuple[str, ...]
    channels: int
    scale: float
    by_sigma: tuple[Statistics, ...]


class Subject:
    """A FP16-mixed DiT and rows of a calibration set, both checked before anything is run.

    `limit` takes that many rows at most, the same number at every sigma and at least one. Raises ToolError.
    """

    def __init__(self, source: Path, calibration: Path, limit: int | None = None) -> None:
        model = graph_io.load(source)
        contract.require_contract(model, "dit", source)
        require_half(model, source)
        whole = CalibrationSet.open(calibration)
        whole.check_values()
        self.source, self.calibration = source, calibration
        self.rows = whole if limit is None else representative(whole, limit)
        self._selection = selection.select_products(model)
        self._places = places(model, self._selection)

    def describe(self) -> str:
        """The files, and how many rows."""
        return f"{self.source}, {self.rows.rows} rows of {self.calibration}"

    def measure(self, headroom: float, fetched: int = FETCHED_ELEMENTS) -> list[Activation]:
        """Run the rows; one entry a distinct activation, in graph order. Raises ToolError for NaN and infinity.

        The scales need every row, so amax is measured first, as the recipe does. Then activations are fetched a row at
        a time and in groups of about `fetched` elements; a group is a session and a run of every row of its own.
        What is fetched is rounded to fp16, as in an engine; between fp16 nodes ONNX Runtime on a CPU rounds nothing, so
        figures of other groupings agree to three digits or so.
        """
        scales = self._scales(headroom)
        tallies: dict[tuple[str, float], Tally] = {}
        groups = list(self._groups(fetched))
        with Progress("activation statistics", len(groups) * self.rows.rows) as progress:
            for group in groups:
                for sigma, found in self._fetch(group):
                    for name in group:
                        tally = tallies.setdefault((name, sigma), Tally(scales[name]))
                        self._add(tally, found[name], name, sigma)
                    progress.advance()
        return [self._entry(name, float(scales[name]), tallies) for name in self._selection.activations]

    def _scales(self, headroom: float) -> dict[str, np.ndarray]:
        """The recipe's scale of every activation, by name."""
        half, names = np.dtype(np.float16), self._selection.activations
        amax = quantization_amax.measure_amax(self.source, self._selection, self.rows)
        for row, column in np.argwhere(~(amax <= np.finfo(half).max)):
            raise self._not_finite(names[column], self.rows.sigmas()[row])
        largest = dict(zip(names, amax.max(axis=0), strict=True))
        return {
            name: quantization_scales.stored_scale(quantization_scales.wanted_scale(largest[name], headroom), half)
            for name in names
        }

    def _fetch(self, group: Sequence[str]) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
        """Sigma and the activations of a group, by name, of one row after the other."""
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        watched = {f"activation_{index}": name for index, name in enumerate(group)}
        with OnnxRuntimeEngine(self.source, graph_io.observed(self.source, watched), low_memory=True) as engine:
            for row in self.rows:
                found = engine.run(tensors(row))
                sigma = round(float(row["t"][0]), 6)
                yield sigma, {name: found[output].numpy() for output, name in watched.items()}

    def _groups(self, fetched: int) -> Iterator[list[str]]:
        """Activations in order, as many together as `fetched` allows; the memory tokens are left out of account."""
        tokens = max(self.rows.frames, shapes.TEXT_TOKENS)
        yield from selection.in_groups({name: tokens * k for name, k in self._channels().items()}, fetched)

    def _channels(self) -> dict[str, int]:
        return {product.activation: product.k for product in self._selection.quantized}

    def _add(self, tally: Tally, values: np.ndarray, name: str, sigma: float) -> None:
        try:
            tally.add(values)
        except ValueError:
            raise self._not_finite(name, sigma) from None

    def _not_finite(self, name: str, sigma: float) -> ToolError:
        return ToolError(
            f"{self.source}: activation {name} does not fit fp16 at sigma {sigma:g}: NaN or over 65504",
            "16 bits do not hold this model, or its weights are damaged; look at the fp32 graph",
        )

    def _entry(self, tensor: str, scale: float, tallies: Mapping[tuple[str, float], Tally]) -> Activation:
        products = tuple(p.node for p in self._selection.quantized if p.activation == tensor)
        found = [self._places[product] for product in products]
        kind = " and ".join(dict.fromkeys(place.kind for place in found))
        layers = sorted({place.layer for place in found if place.layer is not None})
        where = f"layer {layers[0]} " if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]} " if layers else ""
        levels = sorted({sigma for name, sigma in tallies if name == tensor}, reverse=True)
        by_sigma = tuple(tallies[tensor, sigma].statistics(sigma) for sigma in levels)
        return Activation(f"{where}{kind}", kind, tensor, products, self._channels()[tensor], scale, by_sigma)


@dataclass(frozen=True)
class Aggregate:
    """Several activations, or one at several sigmas: the worst of each figure, and the median crest."""

    amax: float
    crest: float
    kurtosis: float
    channel_share: float
    underflow: float


Group = tuple[str | None, float | None]  # kind and sigma; None where the table does not tell them apart


def aggregate(activations: Iterable[Activation], by_kind: bool, by_sigma: bool) -> dict[Group, Aggregate]:
    """Put together what is of one kind, of one sigma, or both: kinds in the order of the network, sigmas falling."""
    found: dict[Group, list[Statistics]] = {}
    for one in activations:
        for statistics in one.by_sigma:
            key = (one.kind if by_kind else None, statistics.sigma if by_sigma else None)
            found.setdefault(key, []).append(statistics)
    return {key: _put_together(found[key]) for key in sorted(found, key=_place_in_table)}


def table_of(sides: Sequence[Mapping[Group, Aggregate]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the aggregates of one model or several: a row a group, a column a figure and model."""
    groups = sorted({group for side in sides for group in side}, key=_place_in_table)
    kinds, sigmas = (any(group[part] is not None for group in groups) for part in (0, 1))
    header = ["input of"] * kinds + ["sigma"] * sigmas
    header += [f"{figure} {name}".rstrip() for figure in FIGURES for name in names]
    rows = []
    for kind, sigma in groups:
        columns = [_cells(side.get((kind, sigma))) for side in sides]
        keys = [str(kind)] * kinds + [f"{sigma or 0:.4f}"] * sigmas
        rows.append([*keys, *(column[figure] for figure in range(len(FIGURES)) for column in columns)])
    return header, rows


def document(subjects: Iterable[tuple[Subject, Sequence[Activation]]], headroom: float) -> dict[str, Any]:
    """Everything, as JSON: a figure that does not exist (NaN) is null."""
    models = [
        {
            "input": str(subject.source),
            "calib": str(subject.calibration),
            "sha256": input_digests(subject.source, subject.calibration),
            "rows": subject.rows.rows,
            "latent_frames": sorted(set(subject.rows.lengths())),
            "activations": [_without_nan(asdict(one)) for one in activations],
        }
        for subject, activations in subjects
    ]
    tools = manifest.tool_versions(manifest.TOOLS)
    return {
        "format": FORMAT,
        "tools": tools,
        "headroom": headroom,
        "kurtosis": "plain: 3 for a Gaussian",
        "models": models,
    }


def _put_together(found: Sequence[Statistics]) -> Aggregate:
    def figures(name: str) -> list[float]:
        return [value for one in found if not math.isnan(value := getattr(one, name))] or [math.nan]

    return Aggregate(
        max(figures("amax")),
        float(np.median(figures("crest"))),
        max(figures("kurtosis")),
        min(figures("channel_share")),
        max(figures("underflow")),
    )


def _cells(one: Aggregate | None) -> list[str]:
    if one is None:
        return ["-"] * len(FIGURES)
    cells = f"{one.amax:.4g}", f"{one.crest:.2f}", f"{one.kurtosis:.4g}", f"{one.channel_share:.4f}"
    return ["-" if cell == "nan" else cell for cell in (*cells, f"{one.underflow:.2e}")]


def _place_in_table(key: Group) -> tuple[int, float]:
    kind, sigma = key
    return KINDS.index(kind) if kind in KINDS else len(KINDS), -(sigma or 0.0)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
