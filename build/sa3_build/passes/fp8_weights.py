"""Store quantised weights as E4M3: half the sidecar, and no quantizer left to run or to fold."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sa3_build import graph
from sa3_build.passes.base import GraphNotRecognised, PassResult

SUFFIX = "_e4m3"
E4M3 = ml_dtypes.float8_e4m3fn
E4M3_MAX = 448.0


class StoreWeightsAsFp8:
    """Replace weight -> QuantizeLinear -> DequantizeLinear by an E4M3 initializer -> DequantizeLinear.

    Needs Q/DQ pairs on weights with constant scales along one axis. Leaves activation pairs alone; a weight that feeds
    several pairs is stored once a pair.
    """

    name = "fp8-weights"

    def requires(self, model: ir.Model) -> None:
        for quantize in _weight_quantizers(model):
            if graph.constant_of(quantize.inputs[1]) is None:
                raise GraphNotRecognised(f"{quantize.name} has a computed scale")

    def call(self, model: ir.Model) -> PassResult:
        quantizers = list(_weight_quantizers(model))
        for quantize in quantizers:
            weight, scale = quantize.inputs[0], graph.constant_of(quantize.inputs[1])
            assert weight is not None and weight.const_value is not None and scale is not None
            axis = quantize.attributes.get_int("axis", 1)
            stored = quantized(weight.const_value.numpy(), scale, axis)
            value = ir.val(f"{weight.name}{SUFFIX}", const_value=ir.tensor(stored))
            model.graph.register_initializer(value)
            for use in list(quantize.outputs[0].uses()):
                use.node.replace_input_with(use.idx, value)
            model.graph.remove(quantize, safe=True)
            if not weight.uses() and not weight.is_graph_output():
                model.graph.initializers.pop(str(weight.name))
        return PassResult(self.name, {"weights": len(quantizers)})

    def ensures(self, model: ir.Model) -> None:
        assert not list(_weight_quantizers(model)), "a weight is still quantised at run time"


def quantized(weight: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """E4M3 codes of weight / scale, rounded to nearest even and saturated at +-448. scale is one number a channel."""
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    ratio = weight.astype(np.float32) / scale.astype(np.float32).reshape(shape)
    return np.clip(ratio, -E4M3_MAX, E4M3_MAX).astype(E4M3)


def _weight_quantizers(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in model.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    ]
