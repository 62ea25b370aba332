"""The shapes of a graph with its axes as symbols: where the batch is in every tensor, and what lengths are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from sa3_build.graph import shape_values
from sa3_build.graph.shape_values import Numbers, whole
from sa3_build.graph.symbolic_dim import Length, Shape, broadcast, quotient

ELEMENTWISE = frozenset(
    (
        "Abs", "Add", "And", "Cast", "Clip", "Cos", "Div", "Equal", "Exp", "Greater", "GreaterOrEqual", "Less",
        "LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Reciprocal", "Sigmoid", "Sin", "Softmax",
        "Sqrt", "Sub", "Tanh", "Where",
    )
)  # fmt: skip


class Shapes:
    """Shapes and small integer values of a sorted graph, as far as they follow from its inputs' shapes.

    `step` follows one node; a caller that changes the graph on the way calls it again for what it has changed.
    """

    def __init__(self, model: ir.Model, inputs: dict[str, Shape]) -> None:
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
        if node.op_type == "Shape":
            shape = self.shape(node.inputs[0])
            entries = (
                None if shape is None else list(shape)[node.attributes.get_int("start", 0) : _end(node, len(shape))]
            )
            found = None if entries is None else _objects(entries)
        else:
            found = shape_values.of_node(node, self.numbers)
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
            return [None if None in inputs else _broadcast(inputs)]
        rule = _RULES.get(node.op_type)
        if rule is None or not inputs or inputs[0] is None:
            return [None]
        return rule(self, node, inputs[0])


def _broadcast(shapes: Sequence[Shape | None]) -> Shape:
    known = [shape for shape in shapes if shape is not None]
    rank = max(len(shape) for shape in known)
    result: list[Length | None] = [Length(1)] * rank
    for shape in known:
        padded = (Length(1),) * (rank - len(shape)) + shape
        result = [broadcast(first, second) for first, second in zip(result, padded, strict=True)]
    return tuple(result)


def _transpose(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    perm = node.attributes.get("perm")
    order = perm.as_ints() if perm is not None else range(len(shape))[::-1]
    return [tuple(shape[axis] for axis in order)]


def _reduce(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axes = _axes(shapes, node, len(shape))
    if axes is None:
        return [None]
    if node.attributes.get_int("keepdims", 1):
        return [tuple(Length(1) if axis in axes else length for axis, length in enumerate(shape))]
    return [tuple(length for axis, length in enumerate(shape) if axis not in axes)]


def _squeeze(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axes = _axes(shapes, node, len(shape))
    return [None if axes is None else tuple(length for axis, length in enumerate(shape) if axis not in axes)]


def _unsqueeze(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    found = whole(shapes.numbers(node.inputs[1]))
    if found is None:
        return [None]
    rank, rest = len(shape) + len(found), list(shape)
    axes = {axis % rank for axis in found}
    return [tuple(Length(1) if axis in axes else rest.pop(0) for axis in range(rank))]


def _axes(shapes: Shapes, node: ir.Node, rank: int) -> set[int] | None:
    found = whole(shapes.numbers(node.inputs[1])) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return None if found is None else {axis % rank for axis in found}


def _reshape(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    target = shapes.numbers(node.inputs[1])
    if target is None:
        return [None]
    entries: list[Length | None] = list(target)
    for axis, entry in enumerate(entries):
        if entry == Length(0) and not node.attributes.get_int("allowzero", 0):
            entries[axis] = shape[axis]
    if Length(-1) in entries:
        rest = [entry for entry in entries if entry != Length(-1)]
        entries[entries.index(Length(-1))] = quotient(shape, rest)
    return [tuple(entries)]


def _slice(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    starts, ends = shapes.numbers(node.inputs[1]), shapes.numbers(node.inputs[2])
    axes = whole(shapes.numbers(node.inputs[3])) if len(node.inputs) > 3 else None
    steps = whole(shapes.numbers(node.inputs[4])) if len(node.inputs) > 4 else None
    result = list(shape)
    for index, axis in enumerate(axes if axes is not None else []):
        result[axis] = None
        if starts is not None and ends is not None and (steps is None or steps[index] == 1):
            result[axis] = _span(shape[axis], starts[index], ends[index])
    return [tuple(result) if axes is not None else (None,) * len(shape)]


def _span(size: Length | None, start: Length | None, end: Length | None) -> Length | None:
    """How much of an axis of this size lies between start and end; None when that is not certain."""
    if size is None or start is None or end is None:
        return None
    first, last = (_position(size, bound) for bound in (start, end))
    if first is None or last is None:
        return None
    span = last - first
    return span if span.number is None or span.number >= 0 else Length(0)


def _position(size: Length, bound: Length) -> Length | None:
    """A slice's bound counted from the beginning, within the axis; -(L + 64) counts L + 64 from the end."""
    if any(count < 0 for _, count in bound.terms) or (bound.number or 0) < 0:
        bound = size + bound
    beyond = (bound - size).number
    if beyond is not None:
        return size if beyond > 0 else bound
    if bound.number is not None:
        return bound if bound.number < 2**31 else size
    return None


def _split(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axis = node.attributes.get_int("axis", 0) % len(shape)
    count, length = len(node.outputs), shape[axis]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        found = shapes.numbers(node.inputs[1])
        parts = list(found) if found is not None else [None] * count
    else:
        parts = [length.over(count) if length is not None else None] * count
    return [(*shape[:axis], part, *shape[axis + 1 :]) for part in parts]


def _gather(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axis, indices = node.attributes.get_int("axis", 0) % len(shape), shapes.shape(node.inputs[1])
    return [None if indices is None else shape[:axis] + indices + shape[axis + 1 :]]


def _concat(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    parts = [shapes.shape(value) for value in node.inputs]
    axis = node.attributes["axis"].as_int() % len(shape)
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return [None]
    total: Length | None = Length(0)
    for part in known:
        length = part[axis]
        total = None if total is None or length is None else total + length
    for other in range(len(shape)):
        if other != axis and len({part[other] for part in known} - {None}) > 1:
            raise ValueError(f"axes {', '.join(str(part[other]) for part in known)} do not go together")
    merged = [next((part[other] for part in known if part[other] is not None), None) for other in range(len(shape))]
    return [(*merged[:axis], total, *merged[axis + 1 :])]


def _expand(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    target = shapes.numbers(node.inputs[1])
    return [None if target is None else _broadcast([shape, tuple(target)])]


def _matmul(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    other = shapes.shape(node.inputs[1])
    if other is None or len(shape) < 2 or len(other) < 2:
        return [None]
    broadcast(shape[-1], other[-2])
    return [(*_broadcast([shape[:-2], other[:-2]]), shape[-2], other[-1]) if len(shape) + len(other) > 4 else
            (shape[0], other[1])]  # fmt: skip


def _gemm(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    other = shapes.shape(node.inputs[1])
    rows = shape[1 if node.attributes.get_int("transA", 0) else 0]
    return [None if other is None else (rows, other[0 if node.attributes.get_int("transB", 0) else 1])]


def _conv(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    kernel = shapes.shape(node.inputs[1])
    if kernel is None:
        return [None]
    plain = all(length == Length(1) for length in kernel[2:])
    return [(shape[0], kernel[0], *(shape[2:] if plain else (None,) * (len(shape) - 2)))]


def _range(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    start, end, step = (shapes.numbers(value) for value in node.inputs)
    counts = [found is not None and isinstance(found.reshape(-1)[0], Length) for found in (start, end, step)]
    if not all(counts) or whole(start) != [0] or whole(step) != [1] or end is None:
        return [(None,)]
    return [(end.reshape(-1)[0],)]


def _einsum(shapes: Shapes, node: ir.Node, shape: Shape) -> list[Shape | None]:
    left, _, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    known: dict[str, Length | None] = {}
    for term, value in zip(left.split(","), node.inputs, strict=True):
        found = shapes.shape(value)
        if found is None or len(found) != len(term):
            return [None]
        known.update(zip(term, found, strict=True))
    return [tuple(known[letter] for letter in right)]


def _end(node: ir.Node, rank: int) -> int:
    return node.attributes.get_int("end", rank)


def _objects(entries: list[Length | None]) -> Numbers:
    result = np.empty(len(entries), dtype=object)
    result[:] = entries
    return result


_RULES: dict[str, Callable[[Shapes, ir.Node, Shape], Sequence[Shape | None]]] = {
    "Transpose": _transpose, "ReduceMax": _reduce, "ReduceMean": _reduce, "ReduceSum": _reduce, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Reshape": _reshape, "Slice": _slice, "Split": _split, "Gather": _gather,
    "Concat": _concat, "Expand": _expand, "MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Range": _range,
    "Einsum": _einsum,
}  # fmt: skip
