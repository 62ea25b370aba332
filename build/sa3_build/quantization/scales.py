"""Set the scales of a quantised graph: activations per tensor, weights per output channel."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.quantizers import dequantizers, quantized_source
from sa3_build.quantization.selection import Product, Selection
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.number_formats import E4M3_MAX

FP16_SCALE_FLOOR = 2.0**-14  # the smallest normal fp16: below it a stored scale loses bits, and TensorRT refuses zero

SCALE_AGREEMENT = 0.005  # ModelOpt's scales are stored in fp16 and come from the same rows


def apply_scales(
    model: ir.Model, selection: Selection, amax: np.ndarray, headroom: float, calibrated: bool = True
) -> dict[str, Any]:
    """Set every scale of a quantised graph: activations amax * headroom / 448, weights amax / 448 a channel.

    Returns counts and the range of scales. Raises ToolError for an activation that was zero in every row or a weight
    that is zero throughout, and, when the graph is `calibrated` (by ModelOpt), GateError if that calibration saw other
    activations than we did.
    """
    by_name = {str(node.name): node for node in model.graph}
    largest = dict(zip(selection.activations, amax.max(axis=0), strict=True))
    theirs: dict[str, float] = {}
    scales: list[float] = []
    floored = 0
    for product in selection.quantized:
        pairs = dequantizers(by_name[product.node])
        if pairs[0] is None or pairs[1] is None:
            continue  # the proof says which one and stops the build
        if largest[product.activation] <= 0 or not np.isfinite(largest[product.activation]):
            raise ToolError(
                f"activation {product.activation} of {product.node} is {largest[product.activation]:g} in every row",
                "calibrate with rows that reach it: build/make_calib.py with more prompts",
            )
        if product.activation not in theirs:
            theirs[product.activation] = _scale_of(pairs[0])
            floored += _set_scale(pairs[0], wanted_scale(largest[product.activation], headroom))
            scales.append(_scale_of(pairs[0]))
        weight = query.constant_of(quantized_source(pairs[1]))
        assert weight is not None, f"the weight of {product.node} is not behind a quantizer"
        axis = None if product.channel_axis is None else pairs[1].attributes.get_int("axis", 1)
        floored += _set_scale(pairs[1], channel_amax(weight, product, axis) / E4M3_MAX)
    ratios = np.array([largest[name] / scale for name, scale in theirs.items()])
    spread = float(ratios.max() / ratios.min() - 1) if len(ratios) else 0.0
    if calibrated and spread > 2 * SCALE_AGREEMENT:
        worst = list(theirs)[int(np.argmax(np.abs(ratios / np.median(ratios) - 1)))]
        raise GateError(
            f"ModelOpt's calibration and ours disagree by {spread:.2%} (worst at {worst})",
            "the calibration rows may have changed under the run; else --keep-intermediates and compare the graphs",
        )
    return {
        "activation scales": len(theirs),
        "weight scales": len(selection.quantized),
        "activation scale range": [min(scales, default=0.0), max(scales, default=0.0)],
        "at the floor": floored,
        "agreement with ModelOpt": spread if calibrated else None,
    }


def channel_amax(weight: np.ndarray, product: Product, axis: int | None) -> np.ndarray:
    """The largest magnitude of every channel of a product's weight along `axis`, or of all of it.

    Raises ToolError when all of it is zero.
    """
    found: np.ndarray = np.abs(weight.astype(np.float32)).max(axis=tuple(a for a in range(weight.ndim) if a != axis))
    if not 0 < found.max() < np.inf:  # NaN too
        raise ToolError(
            f"weight {product.weight} of {product.node} is zero throughout or not finite",
            "the checkpoint or the graph is damaged: export the DiT again",
        )
    return found


def wanted_scale(amax: float, headroom: float) -> np.ndarray:
    """The scale of an activation: E4M3 ends at 448, and `headroom` times amax shall still fit."""
    return np.asarray(amax * headroom / E4M3_MAX)


def stored_scale(wanted: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Scales as they are stored: not under the floor, and rounded up so that amax still fits."""
    bounded = np.maximum(np.asarray(wanted, np.float32), FP16_SCALE_FLOOR)
    stored = bounded.astype(dtype)
    above = np.nextafter(stored, dtype.type(np.inf))
    return np.where(stored.astype(np.float32) < bounded, above, stored).astype(dtype)


def _scale_of(dequantize: ir.Node) -> float:
    scale = query.constant_of(dequantize.inputs[1])
    assert scale is not None
    return float(scale.reshape(-1)[0])


def _set_scale(dequantize: ir.Node, wanted: np.ndarray) -> int:
    """Store the scale of a Q/DQ pair; returns how many were under the floor."""
    value = dequantize.inputs[1]
    assert value is not None and value.const_value is not None
    stored = stored_scale(wanted, value.const_value.dtype.numpy())
    value.const_value = ir.tensor(stored.reshape(value.const_value.shape.numpy()), name=value.name)
    return int((np.asarray(wanted) < FP16_SCALE_FLOOR).sum())
