"""Store quantised weights as FP8 E4M3 codes instead of fp16 values and a quantizer.

A quantised linear layer computes y = x W with both operands rounded to E4M3 (see e4m3.py). In a graph with Q/DQ pairs
the weight is stored in fp16 and rounded in every run:
    W (fp16) -> QuantizeLinear(scale) -> codes -> DequantizeLinear(scale) -> MatMul
The codes depend only on constants, so this pass computes them once and stores them:
    codes (E4M3 initializer) -> DequantizeLinear(scale) -> MatMul
QuantizeLinear divides by the scale, rounds to the nearest code and saturates at 448; DequantizeLinear multiplies by the
same scale (one per output channel). An engine does not run the latter: it multiplies codes by codes and applies the
product of weight and activation scale to the accumulated result. The stored weights have half the size of fp16. Their
codes may also come from a better rounding than to nearest (GPTQ, see quantization/gptq.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from sa3_build.e4m3 import SUFFIX, Codes, quantized
from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.passes.base import PassResult


class StoreWeightsAsFp8:
    """Replace weight -> QuantizeLinear -> DequantizeLinear by an E4M3 initializer -> DequantizeLinear.

    Requires Q/DQ pairs on weights with constant scales along one axis. Activation pairs are not changed; a weight with
    several pairs is stored once per pair. `codes` maps weight names to codes to store; other weights are rounded to the
    nearest code.
    """

    name = "fp8-weights"

    def __init__(self, codes: Mapping[str, Codes] | None = None) -> None:
        self._codes = dict(codes or {})

    def requires(self, model: ir.Model) -> None:
        for quantize in _weight_quantizers(model):
            if query.constant_of(quantize.inputs[1]) is None:
                raise GraphNotRecognised(f"{quantize.name} has a computed scale")

    def call(self, model: ir.Model) -> PassResult:
        quantizers = list(_weight_quantizers(model))
        for quantize in quantizers:
            weight, scale = quantize.inputs[0], query.constant_of(quantize.inputs[1])
            assert weight is not None and weight.const_value is not None and scale is not None
            axis = quantize.attributes.get_int("axis", 1)
            codes = self._codes.get(str(weight.name))
            stored = codes.read() if codes is not None else quantized(weight.const_value.numpy(), scale, axis)
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


def _weight_quantizers(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in model.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer()
    ]
