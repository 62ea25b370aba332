"""Store quantised weights as E4M3: half the sidecar, and no quantizer left to run or to fold."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from sa3_build.e4m3 import SUFFIX, Codes, quantized
from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.passes.base import PassResult


class StoreWeightsAsFp8:
    """Replace weight -> QuantizeLinear -> DequantizeLinear by an E4M3 initializer -> DequantizeLinear.

    Needs Q/DQ pairs on weights with constant scales along one axis. Leaves activation pairs alone; a weight that feeds
    several pairs is stored once a pair. `codes` gives those of some weights, by name; the others' are the nearest.
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
            given = self._codes.get(str(weight.name))
            stored = given.read() if given is not None else quantized(weight.const_value.numpy(), scale, axis)
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
