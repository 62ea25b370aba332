"""Set the FP8 scales of a quantised graph: one per activation tensor, one per output channel of a weight.

QuantizeLinear computes code = round(x / scale), DequantizeLinear computes x = code * scale, and E4M3 codes end at
+-448. Hence
    activation: scale = headroom * amax / 448    (amax over all calibration rows)
    weight:     scale = amax / 448               (amax of the output channel)
Headroom > 1 leaves room for activations that are larger than any in the calibration set; E4M3 is a floating point
format, so that a larger scale costs precision only for very small values. An engine applies both scales after the
matrix product, in which codes are multiplied by codes: y = (codes_x @ codes_W) * scale_x * scale_W. ModelOpt inserts
the pairs with scales of its own; they are replaced, because it uses a fixed headroom of 12.4. Scales are stored in the
graph's type (fp16), rounded up so that amax stays representable, and are at least 2^-14.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.quantizers import dequantizers, quantized_source
from sa3_build.quantization.selection import Linear, Selection
from sa3_trt_core.errors import GateError, ToolError
from sa3_trt_core.number_formats import E4M3_MAX

FP16_SCALE_FLOOR = 2.0**-14  # smallest normal fp16: a smaller scale loses bits when stored, and TensorRT rejects zero

SCALE_AGREEMENT = 0.005  # relative; ModelOpt's scales are stored in fp16 and come from the same rows


def apply_scales(
    model: ir.Model, selection: Selection, amax: np.ndarray, headroom: float, calibrated: bool = True
) -> dict[str, Any]:
    """Set every scale of a quantised graph: activations amax * headroom / 448, weights amax / 448 per channel.

    Returns counts and the range of scales. Raises ToolError for an activation that is zero in every row and for an
    all-zero weight. If the graph is `calibrated` (by ModelOpt), raises GateError when that calibration's scales
    disagree.
    """
    nodes = {str(node.name): node for node in model.graph}
    amax_by_activation = dict(zip(selection.activations, amax.max(axis=0), strict=True))
    inserted_scales: dict[str, float] = {}
    scales: list[float] = []
    floored = 0
    for linear in selection.quantized:
        pairs = dequantizers(nodes[linear.node])
        if pairs[0] is None or pairs[1] is None:
            continue  # the proof names it and stops the build
        largest = amax_by_activation[linear.activation]
        if largest <= 0 or not np.isfinite(largest):
            raise ToolError(
                f"activation {linear.activation} of {linear.node} is {largest:g} in every row",
                "calibrate with rows that reach it: build/make_calib.py with more prompts",
            )
        if linear.activation not in inserted_scales:
            inserted_scales[linear.activation] = _scale_of(pairs[0])
            floored += _set_scale(pairs[0], activation_scale(largest, headroom))
            scales.append(_scale_of(pairs[0]))
        weight = query.constant_of(quantized_source(pairs[1]))
        assert weight is not None, f"the weight of {linear.node} has no quantizer"
        axis = None if linear.channel_axis is None else pairs[1].attributes.get_int("axis", 1)
        floored += _set_scale(pairs[1], channel_amax(weight, linear, axis) / E4M3_MAX)
    ratios = np.array([amax_by_activation[name] / scale for name, scale in inserted_scales.items()])
    disagreement = float(ratios.max() / ratios.min() - 1) if len(ratios) else 0.0
    if calibrated and disagreement > 2 * SCALE_AGREEMENT:
        worst = list(inserted_scales)[int(np.argmax(np.abs(ratios / np.median(ratios) - 1)))]
        raise GateError(
            f"activation scales disagree with ModelOpt's calibration by {disagreement:.2%} (worst at {worst})",
            "was the .npz modified during the build? otherwise rerun with --keep-intermediates and compare the graphs",
        )
    return {
        "activation_scales": len(inserted_scales),
        "weight_scales": len(selection.quantized),
        "activation_scale_range": [min(scales, default=0.0), max(scales, default=0.0)],
        "scales_at_floor": floored,
        "agreement_with_modelopt": disagreement if calibrated else None,
    }


def channel_amax(weight: np.ndarray, linear: Linear, axis: int | None) -> np.ndarray:
    """Return the largest magnitude of every channel of a weight along `axis`, or of the whole weight.

    Raises ToolError when all of it is zero.
    """
    amax: np.ndarray = np.abs(weight.astype(np.float32)).max(axis=tuple(a for a in range(weight.ndim) if a != axis))
    if not 0 < amax.max() < np.inf:  # NaN too
        raise ToolError(
            f"weight {linear.weight} of {linear.node} is all zero or not finite",
            "the checkpoint or the graph is damaged: export the DiT again",
        )
    return amax


def activation_scale(amax: float, headroom: float) -> np.ndarray:
    """Return the scale of an activation, for which `headroom` times amax is representable."""
    return np.asarray(amax * headroom / E4M3_MAX)


def stored_scale(scale: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Return scales as they are stored: at least the floor, rounded up so that amax stays representable."""
    bounded = np.maximum(np.asarray(scale, np.float32), FP16_SCALE_FLOOR)
    stored = bounded.astype(dtype)
    next_larger = np.nextafter(stored, dtype.type(np.inf))
    return np.where(stored.astype(np.float32) < bounded, next_larger, stored).astype(dtype)


def _scale_of(dequantize: ir.Node) -> float:
    scale = query.constant_of(dequantize.inputs[1])
    assert scale is not None
    return float(scale.reshape(-1)[0])


def _set_scale(dequantize: ir.Node, new_scale: np.ndarray) -> int:
    """Store the scale of a Q/DQ pair; return how many entries were under the floor."""
    value = dequantize.inputs[1]
    assert value is not None and value.const_value is not None
    stored = stored_scale(new_scale, value.const_value.dtype.numpy())
    value.const_value = ir.tensor(stored.reshape(value.const_value.shape.numpy()), name=value.name)
    return int((np.asarray(new_scale) < FP16_SCALE_FLOOR).sum())
