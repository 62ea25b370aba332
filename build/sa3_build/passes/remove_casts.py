"""Remove casts that change no values."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.graph.rewrite import remove_unused, replace_uses
from sa3_build.passes.base import Pass, PassResult, check_sorted

FP16, FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT

_HOLDS = {FP16: (FP16, FP32, ir.DataType.DOUBLE), FP32: (FP32, ir.DataType.DOUBLE)}


class DropDeadCasts(Pass):
    """Remove casts that change no values, and merge equal casts.

    Removed are a Cast to the type that its input already has, and the widening in a chain like fp16 -> fp32 -> fp16:
    the second Cast then reads the chain's input. A Cast that rounds stays.
    """

    name = "dead-casts"

    def call(self, model: ir.Model) -> PassResult:
        before = len(model.graph)
        seen: dict[tuple[ir.Value, int], ir.Value] = {}
        for node in list(model.graph):
            if node.op_type != "Cast" or node.inputs[0] is None:
                continue
            source, dtype = _before_widening(node.inputs[0]), node.attributes["to"].as_int()
            if source is not node.inputs[0]:
                node.replace_input_with(0, source)
            equal = source if source.dtype == dtype else seen.setdefault((source, dtype), node.outputs[0])
            if equal is not node.outputs[0] and not node.outputs[0].is_graph_output():
                replace_uses(node.outputs[0], equal)
        remove_unused(model, lambda node: node.op_type == "Cast")
        return PassResult(self.name, {"removed": before - len(model.graph)})

    def ensures(self, model: ir.Model) -> None:
        check_sorted(model)
        for node in model.graph:
            if node.op_type == "Cast" and not node.outputs[0].is_graph_output():
                source = node.inputs[0]
                assert source is None or source.dtype != node.outputs[0].dtype, f"{node.name} changes no values"


def _before_widening(value: ir.Value) -> ir.Value:
    """Return the value before the casts that only widened it."""
    node = value.producer()
    while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        source = node.inputs[0]
        if source.dtype is None or value.dtype not in _HOLDS.get(source.dtype, ()):
            break
        value, node = source, source.producer()
    return value
