"""Make a batch axis that is fixed at 1 dynamic: published graphs run one row, converted ones up to eight."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.rewrite import integers
from sa3_build.graph.shape_inference import Shapes, declared, follow
from sa3_build.graph.symbolic_dim import Length, Shape, symbol
from sa3_build.passes.base import PassResult, check_sorted
from sa3_trt_core.shapes import CONTRACTS, GraphContract

HINT = "export it with a dynamic batch axis, or keep it at one row with --no-free-batch"
BATCH = symbol("B")
ONE = Length(1)
# Ops that work along their `axis`, with its default.
ALONG_AN_AXIS = {
    "Softmax": -1,
    "LogSoftmax": -1,
    "Gather": 0,
    "CumSum": 0,
}


class FreeBatch:
    """Make the batch axis of a DiT dynamic, inferring it through every node.

    Two kinds of node are changed: a Reshape to a first axis of 1 copies that axis instead, and a constant that is
    concatenated to the data (memory tokens) is repeated for every row. A node that mixes rows, or whose output has no
    separate batch axis, is refused by name. A graph with a dynamic batch is not changed.
    """

    name = "free-batch"

    def __init__(self, kind: str = "dit") -> None:
        self._contract: GraphContract = CONTRACTS[kind]

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)
        for value in model.graph.inputs:
            first = value.shape[0] if value.shape is not None and len(value.shape) else 1
            if isinstance(first, int) and first != 1:
                raise _refusal(f"input {value.name} has a fixed batch of {first} rows")

    def call(self, model: ir.Model) -> PassResult:
        if not is_fixed(model):
            return PassResult(self.name, {"freed": 0})
        inputs = {str(value.name): (BATCH, *declared(value)[1:]) for value in model.graph.inputs}
        shapes = Shapes(model, inputs)
        changed = 0
        for node in list(model.graph):
            for current in (*_fit(model, node, shapes), node):
                try:
                    follow(shapes, current)
                except GraphNotRecognised as error:
                    raise _refusal(error.message.partition(": ")[2]) from None
                changed += current is not node
            _require_rows_apart(node, shapes)
        for value, spec in zip(model.graph.outputs, self._contract.outputs, strict=True):
            if shapes.shape(value) != tuple(Length(dim) if isinstance(dim, int) else symbol(dim) for dim in spec.dims):
                raise _refusal(f"output {value.name} has the shape {_words(shapes.shape(value))}")
        self._state(model, shapes)
        return PassResult(self.name, {"freed": 1, "nodes_added": changed})

    def ensures(self, model: ir.Model) -> None:
        check_sorted(model)
        assert not is_fixed(model), "the batch axis is still fixed"

    def _state(self, model: ir.Model, shapes: Shapes) -> None:
        """Store the inferred shapes in the graph, replacing those for one row."""
        for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
            shape = shapes.shape(value)
            value.shape = None if shape is None else ir.Shape([_stated(length) for length in shape])


def is_fixed(model: ir.Model) -> bool:
    """Return True when the batch axis of an input is a number."""
    return any(isinstance(value.shape[0], int) for value in model.graph.inputs if value.shape is not None)


def _fit(model: ir.Model, node: ir.Node, shapes: Shapes) -> list[ir.Node]:
    """Adapt a node that was exported for one row; return the nodes that were inserted before it."""
    if node.op_type == "Reshape":
        return _for_every_row(model, node, shapes)
    if node.op_type == "Concat":
        return _repeat_constants(model, node, shapes)
    return []


def _for_every_row(model: ir.Model, node: ir.Node, shapes: Shapes) -> list[ir.Node]:
    """Multiply the first axis of a Reshape's target by the batch; return the inserted nodes.

    Rows come first in memory, so the first axis follows the batch, wherever a -1 is. A first axis of -1 or 0 already
    does.
    """
    shape, target = shapes.shape(node.inputs[0]), shapes.numbers(node.inputs[1])
    first = target.reshape(-1)[0] if target is not None and target.size else None
    if not shape or target is None or not isinstance(first, Length) or not _counts(shape[0]):
        return []
    if (first.number or 0) < 1:  # -1 and 0 already follow the batch; a symbolic first axis is checked later
        return []
    if node.attributes.get_int("allowzero", 0):
        if Length(0) in list(target.reshape(-1)):
            raise _refusal(f"{described(node)} reshapes to one row with allowzero=1 and a size of 0")
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    target_value, name = node.inputs[1], f"{node.outputs[0].name}_any_rows"
    bounds = [integers(model, f"{name}_{bound}", [bound]) for bound in (0, 1)]
    added = [ir.node("Slice", [target_value, bounds[1], integers(model, f"{name}_to", [2**31 - 1])])]
    if first == ONE and shape[0] == BATCH:
        start = integers(model, f"{name}_copy", [0])
    else:
        first_axis = ir.node("Slice", [target_value, *bounds])
        rows = ir.node("Shape", [model.graph.inputs[0]], {"start": 0, "end": 1})
        total = ir.node("Mul", [first_axis.outputs[0], rows.outputs[0]])
        start = total.outputs[0]
        added = [*added, first_axis, rows, total]
    added.append(ir.node("Concat", [start, added[0].outputs[0]], {"axis": 0}, name=name))
    return _in_front(model, node, 1, added, name)


def _repeat_constants(model: ir.Model, node: ir.Node, shapes: Shapes) -> list[ir.Node]:
    parts = [shapes.shape(value) for value in node.inputs]
    data = next((value for value, part in zip(node.inputs, parts, strict=True) if part and part[0] == BATCH), None)
    added: list[ir.Node] = []
    if (
        data is None
        or any(part is None for part in parts)
        or node.attributes["axis"].as_int() in (0, -len(parts[0] or ()))
    ):
        return added
    for index, part in enumerate(parts):
        if part is not None and part[0] == ONE:
            name = f"{node.outputs[0].name}_rows_{index}"
            rows = ir.node("Shape", [data], {"start": 0, "end": 1}, name=f"{name}_count")
            ones = integers(model, f"{name}_ones", [1] * (len(part) - 1))
            target = ir.node("Concat", [rows.outputs[0], ones], {"axis": 0}, name=f"{name}_target")
            repeat = ir.node("Expand", [node.inputs[index], target.outputs[0]], name=name)
            repeat.outputs[0].type = node.outputs[0].type
            added += _in_front(model, node, index, [rows, target, repeat], name)
    return added


def _in_front(model: ir.Model, node: ir.Node, index: int, added: list[ir.Node], name: str) -> list[ir.Node]:
    """Insert nodes before `node` and make the last one its input `index`; return them."""
    for number, new in enumerate(added):
        new.name = new.name or f"{name}_{number}"
        new.outputs[0].name = f"{name}_value_{number}"
        new.outputs[0].dtype = new.outputs[0].dtype or ir.DataType.INT64
    model.graph.insert_before(node, added)
    node.replace_input_with(index, added[-1].outputs[0])
    return added


def _require_rows_apart(node: ir.Node, shapes: Shapes) -> None:
    """Raise GraphNotRecognised if a node that reads the batch mixes rows or loses the batch axis."""
    if node.op_type == "Range" and _has_batch(shapes.shape(node.outputs[0])):
        raise _refusal(f"{described(node)} counts rows, so that a row would depend on its index")
    if node.op_type == "Cast" and _counts_rows(node, shapes):
        raise _refusal(f"{described(node)} computes with the number of rows")
    if query.gives_sizes(node):
        return
    for value in node.inputs:
        shape = shapes.shape(value)
        if shape is None or not _has_batch(shape):
            continue
        axis = ALONG_AN_AXIS.get(node.op_type)
        if axis is not None and _counts(shape[node.attributes.get_int("axis", axis)]):
            raise _refusal(f"{described(node)} operates across the batch axis")
        for result in node.outputs:
            if not result.uses() and not result.is_graph_output():
                continue
            result_shape = shapes.shape(result)
            if result_shape is None or not _has_rows_apart(result_shape):
                raise _refusal(
                    f"{described(node)} maps {_words(shape)} to {_words(result_shape)} without a separate batch axis"
                )


def _has_rows_apart(shape: Shape) -> bool:
    """Return True if exactly one axis contains the batch, as its outermost factor."""
    rows = [length for length in shape if length is None or _counts(length)]
    return len(rows) == 1 and rows[0] is not None and rows[0].over(BATCH) is not None


def _counts(length: object) -> bool:
    """Return True if a length depends on the batch."""
    return isinstance(length, Length) and length.has("B")


def _counts_rows(node: ir.Node, shapes: Shapes) -> bool:
    numbers = shapes.numbers(node.inputs[0])
    wide = ir.DataType(node.attributes["to"].as_int()).is_floating_point()
    return wide and numbers is not None and _has_batch(tuple(n for n in numbers.reshape(-1) if isinstance(n, Length)))


def _refusal(what: str) -> GraphNotRecognised:
    return GraphNotRecognised(f"the batch axis cannot be made dynamic: {what}", HINT)


def _has_batch(shape: Shape | None) -> bool:
    return shape is not None and any(_counts(length) for length in shape)


def _stated(length: Length | None) -> int | str | None:
    """Return an axis as a graph declares it: a number, a symbol of the contract, or None."""
    if length is None:
        return None
    if length.number is not None:
        return length.number
    return str(length) if length in (BATCH, symbol("L")) else None


def _words(shape: Shape | None) -> str:
    return "an unknown shape" if shape is None else f"[{', '.join('?' if n is None else str(n) for n in shape)}]"
