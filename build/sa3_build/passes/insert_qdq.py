"""Insert Q/DQ pairs on the inputs of selected linear layers: the same as ModelOpt's, with less memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.passes.base import PassResult, check_sorted

FIRST_OPSET = 19  # first opset with FP8 types


class InsertQuantizers:
    """Insert one Q/DQ pair per activation (shared by the layers that read it) and one per weight, with scales of 1.

    `channel_axes` maps a linear layer's node name to the axis of its output channels in the weight, or to None for one
    scale per weight tensor. Requires direct fp16 or fp32 weights. The caller sets the scales.
    """

    name = "insert-qdq"

    def __init__(self, channel_axes: Mapping[str, int | None]) -> None:
        self._channel_axes = dict(channel_axes)

    def requires(self, model: ir.Model) -> None:
        if (model.opset_imports.get("") or 0) < FIRST_OPSET:
            raise GraphNotRecognised(f"opset {model.opset_imports.get('')}; FP8 requires >={FIRST_OPSET}")

    def call(self, model: ir.Model) -> PassResult:
        shared: dict[ir.Value, ir.Value] = {}
        pairs = 0
        for node in self._nodes(model):
            activation, weight = node.inputs[0], node.inputs[1]
            assert activation is not None and weight is not None
            if activation not in shared:
                shared[activation] = _pair(model, node, activation, None)
                pairs += 1
            node.replace_input_with(0, shared[activation])
            node.replace_input_with(1, _pair(model, node, weight, self._channel_axes[str(node.name)]))
            pairs += 1
        model.graph.sort()
        return PassResult(self.name, {"pairs": pairs, "shared_activations": len(self._channel_axes) * 2 - pairs})

    def ensures(self, model: ir.Model) -> None:
        check_sorted(model)
        for node in self._nodes(model):
            for value in node.inputs[:2]:
                producer = value.producer() if value is not None else None
                assert producer is not None and producer.op_type == "DequantizeLinear", f"{node.name} is not quantised"

    def _nodes(self, model: ir.Model) -> Iterable[ir.Node]:
        return [node for node in model.graph if str(node.name) in self._channel_axes]


def _pair(model: ir.Model, before: ir.Node, value: ir.Value, axis: int | None) -> ir.Value:
    """Return the dequantised value of a new Q/DQ pair; per tensor, or per channel along `axis`."""
    assert value.dtype is not None
    shape: tuple[int, ...] = ()
    if axis is not None:  # a weight; the shape of an activation may be unknown
        assert value.shape is not None
        shape = (int(value.shape.numpy()[axis]),)
    scale = _constant(model, f"{value.name}_scale", np.ones(shape, value.dtype.numpy()))
    zero = _constant(model, f"{value.name}_zero_point", np.zeros(shape, ml_dtypes.float8_e4m3fn))
    attributes = {} if axis is None else {"axis": axis}
    quantize = ir.node("QuantizeLinear", [value, scale, zero], attributes, name=f"{value.name}_quantize")
    quantize.outputs[0].name = f"{value.name}_e4m3_codes"
    codes = quantize.outputs[0]
    dequantize = ir.node("DequantizeLinear", [codes, scale, zero], attributes, name=f"{value.name}_dequantize")
    result = dequantize.outputs[0]
    result.name, result.dtype, result.shape = f"{value.name}_dequantized", value.dtype, value.shape
    model.graph.insert_before(before, [quantize, dequantize])
    return result


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value
