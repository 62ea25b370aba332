"""Stage that chooses the E4M3 codes of every weight by GPTQ.

For each linear layer y = x W the stage accumulates the Gram matrix X^T X (K, K) of its input over the tokens of a few
calibration rows and rounds W with it (method: gptq.py). Layers that read the same activation share the matrix. The
weight's scale is fixed before: amax / 448 for each output channel, in the weight's type, as scales.py stores it. Codes
are written to one file per weight, so that an interrupted stage resumes. Rows that the parity check uses are avoided
where possible, so that the check measures rows that the codes were not fitted to.
"""

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

DAMPING = 0.1  # share of the mean diagonal; 0.003 to 0.1 differ little on rows outside the fit (build/NOTES.md)
ROWS = 32  # at most, with one at least of every kind at every sigma; each costs a forward per activation group
GRAM_BYTES = 1 << 29  # Gram matrices in memory at a time; a full-size feed-forward's has 151 MB


def choose_codes(build: Workspace) -> Mapping[str, Any]:
    """Write the codes that GPTQ chooses for the weights of every candidate; return statistics of the change."""
    rows = rows_of(build.calibration, build.parity_rows)
    changes = round_weights(build.clean, build.candidates, rows, build.codes)
    return {**changes, "rows_also_in_parity": len(rows.indices & build.parity_rows.indices)}


def codes_of(build: Workspace) -> Mapping[str, Codes]:
    """Return the chosen codes by the weight's name; empty when weights are rounded to nearest."""
    return stored_codes(build.candidates, build.codes) if build.settings.rounding == "gptq" else {}


def rows_of(calibration: CalibrationSet, parity: CalibrationSet, limit: int = ROWS) -> CalibrationSet:
    """Return the rows to fit on: disjoint from the parity rows if the others are enough and contain every kind."""
    kinds, sigmas = calibration.kinds(), calibration.sigmas()
    disjoint = [index for index in range(calibration.rows) if index not in parity.indices]
    if len(disjoint) < limit or {kinds[index] for index in disjoint} != set(kinds):
        disjoint = list(range(calibration.rows))
    chosen = parity_selection([sigmas[i] for i in disjoint], limit, [kinds[i] for i in disjoint])
    return calibration.subset(disjoint[index] for index in chosen)


def round_weights(
    source: Path, selection: quantization_selection.Selection, rows: CalibrationSet, folder: Path
) -> dict[str, Any]:
    """Write the codes of every weight of `selection` to `folder`, one file each; return statistics of the change.

    `source` is the clean graph. Existing files are kept, so that an interrupted stage resumes.
    """
    folder.mkdir(exist_ok=True)
    model = graph_io.load(source)
    gram_bytes = {linear.activation: 4 * linear.k**2 for linear in selection.quantized}
    groups = list(quantization_selection.in_groups(gram_bytes, GRAM_BYTES))
    with Progress("rounding", len(groups) * rows.rows + len(selection.quantized), "forwards and weights") as progress:
        for group in groups:
            members = [linear for linear in selection.quantized if linear.activation in group]
            missing = [linear for linear in members if not _file(folder, linear).exists()]
            progress.advance(len(members) - len(missing))
            if not missing:
                progress.advance(rows.rows)
                continue
            grams = _grams(source, list(dict.fromkeys(linear.activation for linear in missing)), rows, progress)
            for linear in missing:
                weight = query.constant_of(model.graph.initializers[linear.weight])
                assert weight is not None and linear.channel_axis is not None
                scale = weight_scale(weight, linear)
                codes = gptq.rounded(weight, scale, linear.channel_axis, grams[linear.activation], DAMPING)
                Codes.write(_file(folder, linear), codes)
                progress.advance()
            del grams
            memory.release_to_os()
    return {"rows": rows.rows, "damping": DAMPING, **_changes(model, selection, folder)}


def stored_codes(selection: quantization_selection.Selection, folder: Path) -> dict[str, Codes]:
    """Return the codes that `round_weights` wrote, by the weight's name."""
    return {linear.weight: Codes(_file(folder, linear)) for linear in selection.quantized}


def weight_scale(weight: np.ndarray, linear: quantization_selection.Linear) -> np.ndarray:
    """Return the scales that `scales.apply_scales` stores for a weight.

    amax / 448 per output channel, in the weight's type.
    """
    return scales.stored_scale(scales.channel_amax(weight, linear, linear.channel_axis) / E4M3_MAX, weight.dtype)


def _grams(source: Path, names: Sequence[str], rows: CalibrationSet, progress: Progress) -> dict[str, torch.Tensor]:
    """Return X^T X (K, K), fp32, of each activation over every token of every row."""
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    probes = {f"activation_{index}": name for index, name in enumerate(names)}
    grams: dict[str, torch.Tensor] = {}
    with OnnxRuntimeEngine(
        source, graph_io.with_probe_outputs(source, probes, only_probes=True), low_memory=True
    ) as engine:
        for row in rows:
            outputs = engine.run(tensors(row))
            for output, name in probes.items():
                tokens = outputs[output].reshape(-1, outputs[output].shape[-1]).float()
                grams[name] = grams[name].addmm_(tokens.T, tokens) if name in grams else tokens.T @ tokens
            progress.advance()
    return grams


def _changes(model: Any, selection: quantization_selection.Selection, folder: Path) -> dict[str, Any]:
    """Return the share of codes that differ from the nearest, and the largest deviation of a channel."""
    stored = stored_codes(selection, folder)
    changed = elements = 0
    furthest = 0.0
    for linear in selection.quantized:
        weight = query.constant_of(model.graph.initializers[linear.weight])
        assert weight is not None and linear.channel_axis is not None
        scale, codes = weight_scale(weight, linear), stored[linear.weight].read()
        changed += int((codes.view(np.uint8) != quantized(weight, scale, linear.channel_axis).view(np.uint8)).sum())
        elements += codes.size
        furthest = max(furthest, gptq.deviation(weight, codes, scale, linear.channel_axis))
    return {"linears": len(selection.quantized), "codes_not_nearest": changed / elements, "deviation": furthest}


def _file(folder: Path, linear: quantization_selection.Linear) -> Path:
    return folder / f"{linear.node.replace('/', '_')}.npy"
