"""Statistics of the activations that quantised layers read, per activation and sigma."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3_build.graph import contract, io as graph_io
from sa3_build.quantization import amax as quantization_amax, selection
from sa3_build.quantization.layer_roles import KINDS, roles_of
from sa3_build.quantization.scales import activation_scale, stored_scale
from sa3_build.quantization.streaming_stats import RunningStats, Statistics
from sa3_build.recipes.fp8 import input_digests
from sa3_build.recipes.fp8_inputs import require_fp16_mixed
from sa3_trt_core import shapes
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative, tensors
from sa3_trt_core.console import Progress
from sa3_trt_core.errors import ToolError

FORMAT = 2  # 2: "linears" instead of "products"
FIGURES = ("worst amax", "median crest", "worst kurtosis", "min channel share", "worst underflow")
FETCHED_ELEMENTS = 1 << 27  # activation elements fetched per run, about: 256 MB of fp16


@dataclass(frozen=True)
class Activation:
    """Input of one or more quantised layers, and its statistics at every sigma, highest first."""

    name: str
    kind: str
    tensor: str
    linears: tuple[str, ...]
    channels: int
    scale: float
    by_sigma: tuple[Statistics, ...]


class MeasuredDit:
    """An FP16-mixed DiT and rows of a calibration set, both checked before anything is run.

    `limit` uses at most that many rows, the same number at every sigma and at least one. Raises ToolError.
    """

    def __init__(self, source: Path, calibration: Path, limit: int | None = None) -> None:
        model = graph_io.load(source)
        contract.require_contract(model, "dit", source)
        require_fp16_mixed(model, source)
        all_rows = CalibrationSet.open(calibration)
        all_rows.check_values()
        self.source, self.calibration = source, calibration
        self.rows = all_rows if limit is None else representative(all_rows, limit)
        self._selection = selection.select_linears(model)
        self._places = roles_of(model, self._selection)

    def describe(self) -> str:
        """Return the file names and the number of rows."""
        return f"{self.source}, {self.rows.rows} rows of {self.calibration}"

    def measure(self, headroom: float, fetched: int = FETCHED_ELEMENTS) -> list[Activation]:
        """Return the statistics of every distinct activation, in graph order. Raises ToolError for NaN and infinity.

        Scales depend on every row, so amax is measured first, as in the recipe. Then activations are fetched row by row
        in groups of about `fetched` elements; each group needs a session and a run of every row. Fetched values are
        rounded to fp16, as in an engine. ONNX Runtime on a CPU does not round between fp16 nodes, so figures of other
        groupings agree to about three digits.
        """
        scales = self._scales(headroom)
        statistics: dict[tuple[str, float], RunningStats] = {}
        groups = list(self._groups(fetched))
        with Progress("activation statistics", len(groups) * self.rows.rows) as progress:
            for group in groups:
                for sigma, activations in self._fetch(group):
                    for name in group:
                        running = statistics.setdefault((name, sigma), RunningStats(scales[name]))
                        self._add(running, activations[name], name, sigma)
                    progress.advance()
        return [self._entry(name, float(scales[name]), statistics) for name in self._selection.activations]

    def _scales(self, headroom: float) -> dict[str, np.ndarray]:
        """Return the recipe's scale of every activation, by name."""
        fp16, names = np.dtype(np.float16), self._selection.activations
        amax = quantization_amax.measure_amax(self.source, self._selection, self.rows)
        for row, column in np.argwhere(~(amax <= np.finfo(fp16).max)):
            raise self._not_finite(names[column], self.rows.sigmas()[row])
        amax_by_name = dict(zip(names, amax.max(axis=0), strict=True))
        return {name: stored_scale(activation_scale(amax_by_name[name], headroom), fp16) for name in names}

    def _fetch(self, group: Sequence[str]) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
        """Yield sigma and the activations of a group, by name, for one row after another."""
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        probes = {f"activation_{index}": name for index, name in enumerate(group)}
        with OnnxRuntimeEngine(
            self.source, graph_io.with_probe_outputs(self.source, probes), low_memory=True
        ) as engine:
            for row in self.rows:
                outputs = engine.run(tensors(row))
                sigma = round(float(row["t"][0]), 6)
                yield sigma, {name: outputs[output].numpy() for output, name in probes.items()}

    def _groups(self, fetched: int) -> Iterator[list[str]]:
        """Yield activations in order, in groups of at most `fetched` elements; memory tokens are not counted."""
        tokens = max(self.rows.frames, shapes.TEXT_TOKENS)
        yield from selection.in_groups({name: tokens * k for name, k in self._channels().items()}, fetched)

    def _channels(self) -> dict[str, int]:
        return {linear.activation: linear.k for linear in self._selection.quantized}

    def _add(self, running: RunningStats, values: np.ndarray, name: str, sigma: float) -> None:
        try:
            running.add(values)
        except ValueError:
            raise self._not_finite(name, sigma) from None

    def _not_finite(self, name: str, sigma: float) -> ToolError:
        return ToolError(
            f"{self.source}: activation {name} does not fit fp16 at sigma {sigma:g}: NaN or over 65504",
            "fp16 is too small for this model, or its weights are damaged; compare with the fp32 graph",
        )

    def _entry(self, tensor: str, scale: float, statistics: Mapping[tuple[str, float], RunningStats]) -> Activation:
        linears = tuple(p.node for p in self._selection.quantized if p.activation == tensor)
        roles = [self._places[linear] for linear in linears]
        kind = " and ".join(dict.fromkeys(role.kind for role in roles))
        layers = sorted({role.layer for role in roles if role.layer is not None})
        where = f"layer {layers[0]} " if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]} " if layers else ""
        levels = sorted({sigma for name, sigma in statistics if name == tensor}, reverse=True)
        by_sigma = tuple(statistics[tensor, sigma].statistics(sigma) for sigma in levels)
        return Activation(f"{where}{kind}", kind, tensor, linears, self._channels()[tensor], scale, by_sigma)


@dataclass(frozen=True)
class Aggregate:
    """Several activations, or one at several sigmas: the worst of each figure, and the median crest."""

    amax: float
    crest: float
    kurtosis: float
    channel_share: float
    underflow: float


Group = tuple[str | None, float | None]  # kind and sigma; None where the table is not grouped by it


def aggregate(activations: Iterable[Activation], by_kind: bool, by_sigma: bool) -> dict[Group, Aggregate]:
    """Return the statistics grouped by kind, by sigma, or both: kinds in network order, sigmas falling."""
    groups: dict[Group, list[Statistics]] = {}
    for activation in activations:
        for statistics in activation.by_sigma:
            key = (activation.kind if by_kind else None, statistics.sigma if by_sigma else None)
            groups.setdefault(key, []).append(statistics)
    return {key: _put_together(groups[key]) for key in sorted(groups, key=_sort_key)}


def table_of(
    aggregates: Sequence[Mapping[Group, Aggregate]], names: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the aggregates of one or several models.

    One row per group, one column per figure and model.
    """
    groups = sorted({group for group_table in aggregates for group in group_table}, key=_sort_key)
    kinds, sigmas = (any(group[part] is not None for group in groups) for part in (0, 1))
    header = ["input of"] * kinds + ["sigma"] * sigmas
    header += [f"{figure} {name}".rstrip() for figure in FIGURES for name in names]
    rows = []
    for kind, sigma in groups:
        columns = [_cells(group_table.get((kind, sigma))) for group_table in aggregates]
        keys = [str(kind)] * kinds + [f"{sigma or 0:.4f}"] * sigmas
        rows.append([*keys, *(column[figure] for figure in range(len(FIGURES)) for column in columns)])
    return header, rows


def document(subjects: Iterable[tuple[MeasuredDit, Sequence[Activation]]], headroom: float) -> dict[str, Any]:
    """Return all statistics as a JSON document; a figure that does not exist (NaN) is null."""
    models = [
        {
            "input": str(subject.source),
            "calib": str(subject.calibration),
            "sha256": input_digests(subject.source, subject.calibration),
            "rows": subject.rows.rows,
            "latent_frames": sorted(set(subject.rows.lengths())),
            "activations": [_without_nan(asdict(activation)) for activation in activations],
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


def _put_together(statistics: Sequence[Statistics]) -> Aggregate:
    def figures(name: str) -> list[float]:
        return [value for entry in statistics if not math.isnan(value := getattr(entry, name))] or [math.nan]

    return Aggregate(
        max(figures("amax")),
        float(np.median(figures("crest"))),
        max(figures("kurtosis")),
        min(figures("channel_share")),
        max(figures("underflow")),
    )


def _cells(group: Aggregate | None) -> list[str]:
    if group is None:
        return ["-"] * len(FIGURES)
    cells = f"{group.amax:.4g}", f"{group.crest:.2f}", f"{group.kurtosis:.4g}", f"{group.channel_share:.4f}"
    return ["-" if cell == "nan" else cell for cell in (*cells, f"{group.underflow:.2e}")]


def _sort_key(key: Group) -> tuple[int, float]:
    kind, sigma = key
    return KINDS.index(kind) if kind in KINDS else len(KINDS), -(sigma or 0.0)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
