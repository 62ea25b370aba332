"""The rounding stage: Gram matrices of the trunk's activations over calibration rows, then every weight's codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_build import memory
from sa3_build.e4m3 import Codes, quantized
from sa3_build.graph import io as graph_io, query
from sa3_build.quantization import gptq, scales, selection as quantization_selection
from sa3_build.quantization.workspace import Workspace
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, parity_selection, tensors
from sa3_trt_core.console import Progress
from sa3_trt_core.number_formats import E4M3_MAX

if TYPE_CHECKING:
    import torch

DAMPING = 0.1  # share of the mean energy; 0.003 to 0.1 differ little on rows that the fit has not seen (build/NOTES.md)
ROWS = 32  # at most, but one at least of every kind at every sigma; each is a forward a group of activations
GRAM_BYTES = 1 << 29  # of Gram matrices held at once: at full size a feed-forward's is 151 MB, and the limit is 6 GB


def choose_codes(build: Workspace) -> Mapping[str, Any]:
    """Write the codes that GPTQ chooses for the weights of every candidate; returns what was changed."""
    rows = rows_of(build.calibration, build.parity_rows)
    found = round_weights(build.clean, build.candidates, rows, build.codes)
    return {**found, "rows also in the parity": len(rows.indices & build.parity_rows.indices)}


def codes_of(build: Workspace) -> Mapping[str, Codes]:
    """The chosen codes by the weight's name; empty when weights are rounded to the nearest."""
    return stored_codes(build.candidates, build.codes) if build.settings.rounding == "gptq" else {}


def rows_of(calibration: CalibrationSet, parity: CalibrationSet, limit: int = ROWS) -> CalibrationSet:
    """The rows to fit on: none that the parity is measured on, where the others are of every kind and enough."""
    kinds, sigmas = calibration.kinds(), calibration.sigmas()
    others = [index for index in range(calibration.rows) if index not in parity.indices]
    if len(others) < limit or {kinds[index] for index in others} != set(kinds):
        others = list(range(calibration.rows))
    chosen = parity_selection([sigmas[i] for i in others], limit, [kinds[i] for i in others])
    return calibration.subset(others[place] for place in chosen)


def round_weights(
    source: Path, selection: quantization_selection.Selection, rows: CalibrationSet, folder: Path
) -> dict[str, Any]:
    """Leave the codes of every weight of `selection` in `folder`, a file each; returns what was changed.

    `source` is the clean graph. A weight whose file is there already is left: an interrupted stage goes on.
    """
    folder.mkdir(exist_ok=True)
    model = graph_io.load(source)
    held = {product.activation: 4 * product.k**2 for product in selection.quantized}
    groups = list(quantization_selection.in_groups(held, GRAM_BYTES))
    with Progress("rounding", len(groups) * rows.rows + len(selection.quantized), "forwards and weights") as progress:
        for group in groups:
            wanted = [one for one in selection.quantized if one.activation in group]
            missing = [one for one in wanted if not _file(folder, one).exists()]
            progress.advance(len(wanted) - len(missing))
            if not missing:
                progress.advance(rows.rows)
                continue
            grams = _grams(source, list(dict.fromkeys(one.activation for one in missing)), rows, progress)
            for product in missing:
                weight = query.constant_of(model.graph.initializers[product.weight])
                assert weight is not None and product.channel_axis is not None
                scale = weight_scale(weight, product)
                codes = gptq.rounded(weight, scale, product.channel_axis, grams[product.activation], DAMPING)
                Codes.write(_file(folder, product), codes)
                progress.advance()
            del grams
            memory.return_memory()
    return {"rows": rows.rows, "damping": DAMPING, **_changes(model, selection, folder)}


def stored_codes(selection: quantization_selection.Selection, folder: Path) -> dict[str, Codes]:
    """What `round_weights` left, by the weight's name."""
    return {product.weight: Codes(_file(folder, product)) for product in selection.quantized}


def weight_scale(weight: np.ndarray, product: quantization_selection.Product) -> np.ndarray:
    """The scales that `ptq.apply_scales` will store for a weight: amax / 448 a channel, in the weight's type."""
    return scales.stored_scale(scales.channel_amax(weight, product, product.channel_axis) / E4M3_MAX, weight.dtype)


def _grams(source: Path, names: Sequence[str], rows: CalibrationSet, progress: Progress) -> dict[str, torch.Tensor]:
    """X^T X (K, K) of each activation over every token of every row, fp32."""
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    watched = {f"activation_{index}": name for index, name in enumerate(names)}
    grams: dict[str, torch.Tensor] = {}
    with OnnxRuntimeEngine(source, graph_io.observed(source, watched, alone=True), low_memory=True) as engine:
        for row in rows:
            found = engine.run(tensors(row))
            for output, name in watched.items():
                tokens = found[output].reshape(-1, found[output].shape[-1]).float()
                grams[name] = grams[name].addmm_(tokens.T, tokens) if name in grams else tokens.T @ tokens
            progress.advance()
    return grams


def _changes(model: Any, selection: quantization_selection.Selection, folder: Path) -> dict[str, Any]:
    """How many codes are not the nearest, and the furthest that a channel is from its source."""
    stored = stored_codes(selection, folder)
    changed = elements = 0
    furthest = 0.0
    for product in selection.quantized:
        weight = query.constant_of(model.graph.initializers[product.weight])
        assert weight is not None and product.channel_axis is not None
        scale, codes = weight_scale(weight, product), stored[product.weight].read()
        changed += int((codes.view(np.uint8) != quantized(weight, scale, product.channel_axis).view(np.uint8)).sum())
        elements += codes.size
        furthest = max(furthest, gptq.deviation(weight, codes, scale, product.channel_axis))
    return {"products": len(selection.quantized), "codes not nearest": changed / elements, "deviation": furthest}


def _file(folder: Path, product: quantization_selection.Product) -> Path:
    return folder / f"{product.node.replace('/', '_')}.npy"
