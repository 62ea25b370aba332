"""Statistics of activation scales: amax by sigma and row kind, and the shares of saturated and subnormal elements.

An activation scale maps amax * headroom to E4M3's largest value, 448. Elements above 448 * scale saturate, elements
below 2^-6 * scale are subnormal in E4M3 and lose mantissa bits. One scale covers every sigma and kind of row, so the
report lists both shares per sigma: a scale set by one noise level can be too coarse for another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sa3_build.graph import io as graph_io, quantizers, query
from sa3_build.quantization import selection as quantization_selection
from sa3_build.quantization.workspace import Workspace
from sa3_trt_core.artifacts.calibration_layout import KINDS
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, tensors
from sa3_trt_core.console import Progress
from sa3_trt_core.number_formats import E4M3_MAX

MIN_NORMAL = 2.0**-6  # smallest normal E4M3 number; smaller scaled values are subnormal and lose mantissa bits


def amax_table(
    amax: np.ndarray, selection: quantization_selection.Selection, calibration: CalibrationSet
) -> list[dict[str, Any]]:
    """Return amax (R, A) of every row and activation, grouped by activation, sigma and kind of row."""
    sigmas, kinds = _sigma_names(calibration), np.array(calibration.kinds())
    groups = {
        "by_sigma": [(key, sigmas == key) for key in _falling(sigmas)],
        "by_kind": [(key, kinds == key) for key in KINDS if key in kinds],
    }
    return [
        {
            "activation": name,
            "linears": [linear.node for linear in selection.quantized if linear.activation == name],
            "amax": float(amax[:, column].max()),
            **{
                group: {key: float(amax[rows, column].max()) for key, rows in members}
                for group, members in groups.items()
            },
        }
        for column, name in enumerate(selection.activations)
    ]


def scales_of(quantized: Path, selection: quantization_selection.Selection) -> dict[str, float]:
    """Return the stored scale of every activation of `selection` that a quantised graph quantises."""
    nodes = {str(node.name): node for node in graph_io.load(quantized).graph}
    scales: dict[str, float] = {}
    for linear in selection.quantized:
        pair = quantizers.dequantizers(nodes[linear.node])[0]
        scale = query.constant_of(pair.inputs[1]) if pair is not None else None
        if scale is not None:
            scales[linear.activation] = float(scale.reshape(-1)[0])
    return scales


def measure_shares(source: Path, scales: Mapping[str, float], rows: CalibrationSet) -> list[dict[str, Any]]:
    """Return the saturated (|x| > 448 scale) and subnormal shares of elements, by activation and sigma.

    Subnormal means not zero and under 2^-6 scale; such elements lose bits, and under 2^-10 scale all of them. The graph
    counts the elements itself, in one run per row, so that no activation is fetched.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    probes = {f"shares_{index}": name for index, name in enumerate(scales)}
    sigmas = _sigma_names(rows)
    counts: dict[tuple[str, str], np.ndarray] = {}
    probed_graph = graph_io.with_probe_outputs(source, probes, lambda value: _counts(value, scales[str(value.name)]))
    with (
        OnnxRuntimeEngine(source, probed_graph, low_memory=True) as engine,
        Progress("saturated and subnormal shares", rows.rows) as progress,
    ):
        for sigma, row in zip(sigmas, rows, strict=True):
            outputs = engine.run(tensors(row))
            for output, name in probes.items():
                key = (name, str(sigma))
                counts[key] = counts.get(key, np.zeros(3, np.int64)) + outputs[output].numpy().astype(np.int64)
            progress.advance()
    return [
        {
            "activation": name,
            "scale": scale,
            "by_sigma": {sigma: _shares(counts[name, sigma]) for sigma in _falling(sigmas)},
        }
        for name, scale in scales.items()
    ]


def shares(build: Workspace) -> Mapping[str, Any]:
    """Return the shares of the result's scales on the parity rows, which contain every kind at every sigma."""
    rows = build.parity_rows
    measured = measure_shares(build.clean, scales_of(build.result, build.selection), rows)
    return {"rows": rows.rows, "worst": worst_shares(measured), "shares": measured}


def worst_shares(shares: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest saturated and the largest subnormal share of any activation at any sigma."""
    entries = [entry_shares for activation in shares for entry_shares in activation["by_sigma"].values()]
    return {
        key: max((entry_shares[key] for entry_shares in entries), default=0.0) for key in ("saturated", "subnormal")
    }


def _shares(counts: np.ndarray) -> dict[str, float]:
    saturated, subnormal, elements = (int(count) for count in counts)
    return {"saturated": saturated / elements, "subnormal": subnormal / elements}


def _falling(sigmas: np.ndarray) -> list[str]:
    return sorted({str(sigma) for sigma in sigmas}, key=float, reverse=True)


def _sigma_names(rows: CalibrationSet) -> np.ndarray:
    """Return the sigma of every row as text, in the report's format."""
    return np.array([f"{sigma:.6g}" for sigma in rows.sigmas()])


def _counts(value: ir.Value, scale: float) -> list[ir.Node]:
    """Return nodes that count the saturated, the subnormal and all elements of a value: int32 (3,)."""
    as_fp32 = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    absolute = ir.node("Abs", as_fp32.outputs)
    nodes = [as_fp32, absolute]

    def add(kind: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), dict(attributes or {})))
        return nodes[-1].outputs[0]

    def number(entry: float) -> ir.Value:
        return add("Constant", [], {"value": ir.tensor(np.array(entry, np.float32))})

    def count(where: ir.Value) -> ir.Value:
        ones = add("Cast", [where], {"to": int(ir.DataType.INT32)})
        return add("Reshape", [add("ReduceSum", [ones], {"keepdims": 0}), vector_shape])

    vector_shape = add("Constant", [], {"value": ir.tensor(np.array([1], np.int64))})
    magnitude = absolute.outputs[0]
    saturated = count(add("Greater", [magnitude, number(scale * E4M3_MAX)]))
    small = add("Less", [magnitude, number(scale * MIN_NORMAL)])
    subnormal = count(add("And", [small, add("Greater", [magnitude, number(0.0)])]))
    elements = count(add("GreaterOrEqual", [magnitude, number(0.0)]))
    result = add("Concat", [saturated, subnormal, elements], {"axis": 0})
    result.dtype, result.shape = ir.DataType.INT32, ir.Shape([3])
    return nodes
