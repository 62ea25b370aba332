"""Remove casts that change no number."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.graph.rewrite import remove_unused, replace_uses
from sa3_build.passes.base import Pass, PassResult, check_sorted

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT

_HOLDS = {HALF: (HALF, SINGLE, ir.DataType.DOUBLE), SINGLE: (SINGLE, ir.DataType.DOUBLE)}


class DropDeadCasts(Pass):
    """Remove casts that change no number, and make one of several equal ones.

    Dead are a cast to the type that is there already, and the widening in a chain like fp16 -> fp32 -> fp16: the second
    cast then reads what stood before the chain. A cast that rounds stays.
    """

    name = "dead-casts"

    def call(self, model: ir.Model) -> PassResult:
        before = len(model.graph)
        seen: dict[tuple[ir.Value, int], ir.Value] = {}
        for node in list(model.graph):
            if node.op_type != "Cast" or node.inputs[0] is None:
                continue
            source, wanted = _before_widening(node.inputs[0]), node.attributes["to"].as_int()
            if source is not node.inputs[0]:
                node.replace_input_with(0, source)
            twin = source if source.dtype == wanted else seen.setdefault((source, wanted), node.outputs[0])
            if twin is not node.outputs[0] and not node.outputs[0].is_graph_output():
                replace_uses(node.outputs[0], twin)
        remove_unused(model, lambda node: node.op_type == "Cast")
        return PassResult(self.name, {"removed": before - len(model.graph)})

    def ensures(self, model: ir.Model) -> None:
        check_sorted(model)
        for node in model.graph:
            if node.op_type == "Cast" and not node.outputs[0].is_graph_output():
                source = node.inputs[0]
                assert source is None or source.dtype != node.outputs[0].dtype, f"{node.name} changes nothing"


def _before_widening(value: ir.Value) -> ir.Value:
    """What stands before the casts that only widened a value."""
    node = value.producer()
    while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        source = node.inputs[0]
        if source.dtype is None or value.dtype not in _HOLDS.get(source.dtype, ()):
            break
        value, node = source, source.producer()
    return value
