"""Make somebody else's graph readable: constants where they are looked for, no dead casts, a type on every value."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from sa3_build.passes.base import GraphNotRecognised, PassResult, check_sorted, described

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_HOLDS = {HALF: (HALF, SINGLE, ir.DataType.DOUBLE), SINGLE: (SINGLE, ir.DataType.DOUBLE)}


class LiftConstants:
    """Turn Constant nodes into initializers, and take away Identity nodes and whatever nothing reads.

    The older exporter writes every number as a Constant node, and an Identity in front of a weight that layers share:
    behind it a weight would not be seen. A graph of our own exporter has neither.
    """

    name = "lift-constants"

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)
        for function in model.functions.values():
            raise GraphNotRecognised(f"it holds the function {function.name}")
        for node in model.graph:
            for attribute in node.attributes.values():
                if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                    raise GraphNotRecognised(f"{described(node)} holds a graph of its own")

    def call(self, model: ir.Model) -> PassResult:
        before = len(model.graph)
        constants = sum(node.op_type == "Constant" for node in model.graph)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        IdentityEliminationPass()(model)
        if len(model.graph) != before:
            RemoveUnusedNodesPass()(model)
        return PassResult(self.name, {"constants": constants, "nodes removed": before - len(model.graph)})

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            assert node.op_type != "Constant", f"{node.name} is a Constant node still"


class InferTypes:
    """Give every value its type: published graphs state none, and no precision can be judged without.

    ONNX's own inference in its strict mode, which refuses a node whose inputs do not go together. A graph with a type
    on every value is left as it is.
    """

    name = "types"

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)

    def call(self, model: ir.Model) -> PassResult:
        bare = [value for node in model.graph for value in node.outputs if value.dtype is None]
        if not bare:
            return PassResult(self.name, {"typed": 0})
        try:
            inferred = onnx.shape_inference.infer_shapes(
                ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True
            )
        except onnx.shape_inference.InferenceError as error:
            raise GraphNotRecognised(f"its types contradict each other: {_one_line(str(error))}") from None
        found = {value.name: ir.serde.deserialize_value_info_proto(value, None) for value in inferred.graph.value_info}
        for node in model.graph:
            for value in node.outputs:
                known = found.get(str(value.name))
                if known is not None and not value.is_graph_output():
                    value.type = value.type or known.type
                    value.shape = value.shape or known.shape
        return PassResult(self.name, {"typed": len(bare)})

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            for value in node.outputs:
                if value.dtype is None and value.uses():
                    raise GraphNotRecognised(f"the type of {value.name}, an output of {described(node)}, is not known")


class DropDeadCasts:
    """Remove casts that change no number, and make one of several equal ones.

    Dead are a cast to the type that is there already, and the widening in a chain like fp16 -> fp32 -> fp16: the second
    cast then reads what stood before the chain. A cast that rounds stays.
    """

    name = "dead-casts"

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)

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


def type_like(value: ir.Value, like: ir.Value) -> None:
    """Give a new value the element type of another."""
    if like.dtype is not None:
        value.dtype = like.dtype


def replace_uses(value: ir.Value, other: ir.Value) -> None:
    """Let every node that reads `value` read `other`."""
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, other)


def remove_unused(model: ir.Model, which: Callable[[ir.Node], bool]) -> None:
    """Remove the nodes of one kind that nothing reads, users first."""
    for node in reversed(list(model.graph)):
        if which(node) and not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)


def drop_unused_initializers(model: ir.Model) -> None:
    """Remove the initializers that nothing reads."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(name)


def _before_widening(value: ir.Value) -> ir.Value:
    """What stands before the casts that only widened a value."""
    node = value.producer()
    while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        source = node.inputs[0]
        if source.dtype is None or value.dtype not in _HOLDS.get(source.dtype, ()):
            break
        value, node = source, source.producer()
    return value


def _one_line(text: str) -> str:
    return " ".join(text.split())
