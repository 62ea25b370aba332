"""Shape inference with symbolic axes: the batch axis of every tensor, and the lengths that are known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query, shape_values
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.op_shapes import RULES, broadcast_all
from sa3_build.graph.shape_rules import Numbers
from sa3_build.graph.symbolic_dim import Length, Shape, element_count, symbol

ELEMENTWISE = frozenset(
    (
        "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Cos", "Div", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater",
        "GreaterOrEqual", "HardSwish", "Identity", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "LogSoftmax", "Max",
        "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin",
        "Softmax", "Softplus", "Sqrt", "Sub", "Swish", "Tanh", "Where",
    )
)  # fmt: skip


class Shapes:
    """Shapes and small integer values of a sorted graph, inferred from its inputs' shapes.

    `step` infers one node; a caller that edits the graph calls it again for the nodes that it changed.
    """

    def __init__(self, model: ir.Model, inputs: dict[str, Shape]) -> None:
        self._opset = model.opset_imports.get("", 0)
        self._shapes: dict[ir.Value, Shape] = {}
        self._numbers: dict[ir.Value, Numbers] = {}
        for value in model.graph.inputs:
            self._shapes[value] = inputs[str(value.name)]

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Return the shape of a value, or None when its rank is unknown."""
        if value is None:
            return None
        if value.is_initializer() and value.const_value is not None:
            return tuple(Length(size) for size in value.const_value.shape.numpy())
        return self._shapes.get(value)

    def numbers(self, value: ir.Value | None) -> Numbers | None:
        """Return the entries of a small integer value or of a single float; unknown entries are None."""
        if value is None:
            return None
        return shape_values.of_constant(value) if value.is_initializer() else self._numbers.get(value)

    def step(self, node: ir.Node) -> None:
        """Infer the outputs of one node. Raises ValueError when its inputs' shapes are incompatible."""
        numbers: Numbers | None
        if query.gives_sizes(node):
            numbers = _sizes(node, self.shape(node.inputs[0]))
        else:
            numbers = shape_values.of_node(node, self.numbers, self._opset)
        result = node.outputs[0]
        if numbers is not None:
            self._numbers[result] = numbers
            self._shapes[result] = tuple(Length(size) for size in numbers.shape)
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
    """Return the output of a Shape (with its start and end) or Size node."""
    if shape is None:
        return None
    if node.op_type == "Size":
        size = np.empty((), dtype=object)
        size[()] = element_count(shape)
        return size
    return _objects(list(shape)[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(shape))])


def _objects(entries: list[Length | None]) -> Numbers:
    result = np.empty(len(entries), dtype=object)
    result[:] = entries
    return result


def declared(value: ir.Value) -> Shape:
    """Return the shape that a graph input declares."""
    assert value.shape is not None
    return tuple(Length(axis) if isinstance(axis, int) else symbol(str(axis)) for axis in value.shape)


def follow(shapes: Shapes, node: ir.Node) -> None:
    """Infer one node. Raises GraphNotRecognised with its name when its inputs' shapes are incompatible."""
    try:
        shapes.step(node)
    except ValueError as error:
        raise GraphNotRecognised(f"{described(node)}: {error}") from None


def followed(model: ir.Model) -> Shapes:
    """Return the shapes of every value, as far as they follow from the inputs' shapes."""
    shapes = Shapes(model, {str(value.name): declared(value) for value in model.graph.inputs})
    for node in model.graph:
        follow(shapes, node)
    return shapes
