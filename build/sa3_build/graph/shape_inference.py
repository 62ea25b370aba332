"""The shapes of a graph with its axes as symbols: where the batch is in every tensor, and what lengths are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query, shape_values
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.op_shapes import RULES, broadcast_all
from sa3_build.graph.shape_rules import Numbers
from sa3_build.graph.symbolic_dim import Length, Shape, product, symbol

ELEMENTWISE = frozenset(
    (
        "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
        "GreaterOrEqual", "HardSwish", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "LogSoftmax", "Max",
        "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin",
        "Softmax", "Softplus", "Sqrt", "Sub", "Swish", "Tanh", "Where",
    )
)  # fmt: skip


class Shapes:
    """Shapes and small integer values of a sorted graph, as far as they follow from its inputs' shapes.

    `step` follows one node; a caller that changes the graph on the way calls it again for what it has changed.
    """

    def __init__(self, model: ir.Model, inputs: dict[str, Shape]) -> None:
        self._opset = model.opset_imports.get("", 0)
        self._shapes: dict[ir.Value, Shape] = {}
        self._numbers: dict[ir.Value, Numbers] = {}
        for value in model.graph.inputs:
            self._shapes[value] = inputs[str(value.name)]

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value, or None when not even its number of axes is known."""
        if value is None:
            return None
        if value.is_initializer() and value.const_value is not None:
            return tuple(Length(size) for size in value.const_value.shape.numpy())
        return self._shapes.get(value)

    def numbers(self, value: ir.Value | None) -> Numbers | None:
        """The entries of a small integer value, or of a single float, as far as they are known."""
        if value is None:
            return None
        return shape_values.of_constant(value) if value.is_initializer() else self._numbers.get(value)

    def step(self, node: ir.Node) -> None:
        """Follow one node. Raises ValueError when its inputs' shapes do not go together."""
        found: Numbers | None
        if query.gives_sizes(node):
            found = _sizes(node, self.shape(node.inputs[0]))
        else:
            found = shape_values.of_node(node, self.numbers, self._opset)
        result = node.outputs[0]
        if found is not None:
            self._numbers[result] = found
            self._shapes[result] = tuple(Length(size) for size in found.shape)
            return
        shapes = self._outputs(node)
        for value, shape in zip(node.outputs, shapes, strict=False):
            if shape is not None:
                self._shapes[value] = shape

    def _outputs(self, node: ir.Node) -> Sequence[Shape | None]:
        inputs = [self.shape(value) for value in node.inputs if value is not None]
        if node.op_type in ELEMENTWISE:
            return [None if None in inputs else broadcast_all(inputs)]
        rule = RULES.get(node.op_type)
        if rule is None or not inputs or inputs[0] is None:
            return [None] * len(node.outputs)
        return rule(self, node, inputs[0])


def _sizes(node: ir.Node, shape: Shape | None) -> Numbers | None:
    """The numbers of Shape (with its start and end) or Size."""
    if shape is None:
        return None
    if node.op_type == "Size":
        found = np.empty((), dtype=object)
        found[()] = product(shape)
        return found
    return _objects(list(shape)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))])


def _objects(entries: list[Length | None]) -> Numbers:
    result = np.empty(len(entries), dtype=object)
    result[:] = entries
    return result


def declared(value: ir.Value) -> Shape:
    """The shape that a graph input states."""
    assert value.shape is not None
    return tuple(Length(axis) if isinstance(axis, int) else symbol(str(axis)) for axis in value.shape)


def follow(shapes: Shapes, node: ir.Node) -> None:
    """Follow one node. Raises GraphNotRecognised naming it when its inputs' shapes do not go together."""
    try:
        shapes.step(node)
    except ValueError as error:
        raise GraphNotRecognised(f"{described(node)}: {error}") from None


def followed(model: ir.Model) -> Shapes:
    """The shapes of every value, as far as they follow from the inputs'."""
    shapes = Shapes(model, {str(value.name): declared(value) for value in model.graph.inputs})
    for node in model.graph:
        follow(shapes, node)
    return shapes
