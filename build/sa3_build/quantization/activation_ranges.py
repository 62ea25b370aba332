"""What the scales of activations are made of and do: amax by sigma and kind, shares saturated and subnormal."""

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

SMALLEST_NORMAL = 2.0**-6  # of E4M3: what is smaller, after scaling, keeps fewer than its three bits of mantissa


def amax_table(
    amax: np.ndarray, selection: quantization_selection.Selection, calibration: CalibrationSet
) -> list[dict[str, Any]]:
    """amax (R, A) of every row and activation, put together by activation, sigma and kind of row."""
    sigmas, kinds = _sigma_names(calibration), np.array(calibration.kinds())
    groups = {
        "by sigma": [(key, sigmas == key) for key in _falling(sigmas)],
        "by kind": [(key, kinds == key) for key in KINDS if key in kinds],
    }
    return [
        {
            "activation": name,
            "products": [product.node for product in selection.quantized if product.activation == name],
            "amax": float(amax[:, column].max()),
            **{
                group: {key: float(amax[rows, column].max()) for key, rows in members}
                for group, members in groups.items()
            },
        }
        for column, name in enumerate(selection.activations)
    ]


def scales_of(quantized: Path, selection: quantization_selection.Selection) -> dict[str, float]:
    """The stored scale of every activation of `selection` that a quantised graph quantises."""
    by_name = {str(node.name): node for node in graph_io.load(quantized).graph}
    found: dict[str, float] = {}
    for product in selection.quantized:
        pair = quantizers.dequantizers(by_name[product.node])[0]
        scale = query.constant_of(pair.inputs[1]) if pair is not None else None
        if scale is not None:
            found[product.activation] = float(scale.reshape(-1)[0])
    return found


def measure_shares(source: Path, scales: Mapping[str, float], rows: CalibrationSet) -> list[dict[str, Any]]:
    """The shares of elements that the scales saturate (|x| > 448 scale) or make subnormal, by activation and sigma.

    Subnormal: not zero, and under 2^-6 of the scale; these lose bits, and under 2^-10 all of them. The counts are made
    inside the graph, in one run of every row, so that no activation is ever fetched.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    watched = {f"shares_{index}": name for index, name in enumerate(scales)}
    sigmas = _sigma_names(rows)
    counts: dict[tuple[str, str], np.ndarray] = {}
    observed = graph_io.observed(source, watched, lambda value: _counts(value, scales[str(value.name)]))
    with (
        OnnxRuntimeEngine(source, observed, low_memory=True) as engine,
        Progress("saturated and subnormal shares", rows.rows) as progress,
    ):
        for sigma, row in zip(sigmas, rows, strict=True):
            found = engine.run(tensors(row))
            for output, name in watched.items():
                key = (name, str(sigma))
                counts[key] = counts.get(key, np.zeros(3, np.int64)) + found[output].numpy().astype(np.int64)
            progress.advance()
    return [
        {
            "activation": name,
            "scale": scale,
            "by sigma": {sigma: _shares(counts[name, sigma]) for sigma in _falling(sigmas)},
        }
        for name, scale in scales.items()
    ]


def shares(build: Workspace) -> Mapping[str, Any]:
    """Measure the shares of the result's scales on the parity rows, which hold every kind at every sigma."""
    rows = build.parity_rows
    found = measure_shares(build.clean, scales_of(build.result, build.selection), rows)
    return {"rows": rows.rows, "worst": worst_shares(found), "shares": found}


def worst_shares(shares: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The largest saturated and the largest subnormal share of any activation at any sigma."""
    found = [at for entry in shares for at in entry["by sigma"].values()]
    return {key: max((at[key] for at in found), default=0.0) for key in ("saturated", "subnormal")}


def _shares(counts: np.ndarray) -> dict[str, float]:
    saturated, subnormal, elements = (int(count) for count in counts)
    return {"saturated": saturated / elements, "subnormal": subnormal / elements}


def _falling(sigmas: np.ndarray) -> list[str]:
    return sorted({str(sigma) for sigma in sigmas}, key=float, reverse=True)


def _sigma_names(rows: CalibrationSet) -> np.ndarray:
    """The sigma of every row as the report writes it."""
    return np.array([f"{sigma:.6g}" for sigma in rows.sigmas()])


def _counts(value: ir.Value, scale: float) -> list[ir.Node]:
    """Nodes that count the saturated, the subnormal and all elements of a value: int32 (3,)."""
    wide = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    size = ir.node("Abs", wide.outputs)
    nodes = [wide, size]

    def add(kind: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None) -> ir.Value:
        nodes.append(ir.node(kind, list(inputs), dict(attributes or {})))
        return nodes[-1].outputs[0]

    def number(at: float) -> ir.Value:
        return add("Constant", [], {"value": ir.tensor(np.array(at, np.float32))})

    def count(where: ir.Value) -> ir.Value:
        ones = add("Cast", [where], {"to": int(ir.DataType.INT32)})
        return add("Reshape", [add("ReduceSum", [ones], {"keepdims": 0}), one])

    one = add("Constant", [], {"value": ir.tensor(np.array([1], np.int64))})
    magnitude = size.outputs[0]
    saturated = count(add("Greater", [magnitude, number(scale * E4M3_MAX)]))
    small = add("Less", [magnitude, number(scale * SMALLEST_NORMAL)])
    subnormal = count(add("And", [small, add("Greater", [magnitude, number(0.0)])]))
    elements = count(add("GreaterOrEqual", [magnitude, number(0.0)]))
    result = add("Concat", [saturated, subnormal, elements], {"axis": 0})
    result.dtype, result.shape = ir.DataType.INT32, ir.Shape([3])
    return nodes
