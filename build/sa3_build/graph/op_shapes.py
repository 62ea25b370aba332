"""Shape inference rules, one per op: output shapes of a node from its input shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import onnx_ir as ir

from sa3_build.graph.shape_rules import Numbers, as_integers
from sa3_build.graph.symbolic_dim import Length, Shape, broadcast, element_count, quotient


class ShapeLookup(Protocol):
    """Shapes and integer values that have been inferred so far: shape_inference.Shapes."""

    def shape(self, value: ir.Value | None) -> Shape | None: ...
    def numbers(self, value: ir.Value | None) -> Numbers | None: ...


def broadcast_all(shapes: Sequence[Shape | None]) -> Shape:
    """Return the broadcast of several shapes, ignoring unknown ones. Raises ValueError if they are incompatible."""
    known = [shape for shape in shapes if shape is not None]
    rank = max(len(shape) for shape in known)
    result: list[Length | None] = [Length(1)] * rank
    for shape in known:
        padded = (Length(1),) * (rank - len(shape)) + shape
        result = [broadcast(first, second) for first, second in zip(result, padded, strict=True)]
    return tuple(result)


def _transpose(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    perm = node.attributes.get("perm")
    order = perm.as_ints() if perm is not None else range(len(shape))[::-1]
    return [tuple(shape[axis] for axis in order)]


def _reduce(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axes = _axes(shapes, node, len(shape))
    if axes is None:
        return [None]
    if node.attributes.get_int("keepdims", 1):
        return [tuple(Length(1) if axis in axes else length for axis, length in enumerate(shape))]
    return [tuple(length for axis, length in enumerate(shape) if axis not in axes)]


def _squeeze(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axes = _axes(shapes, node, len(shape))
    if axes is not None and any(shape[axis] not in (None, Length(1)) for axis in axes):
        raise ValueError(f"Squeeze removes an axis of {', '.join(str(shape[axis]) for axis in sorted(axes))}")
    return [None if axes is None else tuple(length for axis, length in enumerate(shape) if axis not in axes)]


def _unsqueeze(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    unsqueezed = as_integers(shapes.numbers(node.inputs[1])) if len(node.inputs) > 1 else None
    if unsqueezed is None:
        return [None]
    rank, rest = len(shape) + len(unsqueezed), list(shape)
    axes = {axis % rank for axis in unsqueezed}
    return [tuple(Length(1) if axis in axes else rest.pop(0) for axis in range(rank))]


def _axes(shapes: ShapeLookup, node: ir.Node, rank: int) -> set[int] | None:
    """Return the axes that a node names, as an input or (before opset 18) as an attribute.

    A reduction without axes reduces all of them. Returns None if the axes are unknown.
    """
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = as_integers(shapes.numbers(node.inputs[1]))
    else:
        stated = node.attributes.get("axes")
        axes = list(stated.as_ints()) if stated is not None else None
        if stated is None and node.op_type.startswith("Reduce"):
            axes = [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return None if axes is None else {axis % rank for axis in axes}


def _reshape(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
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


def _slice(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    starts, ends = shapes.numbers(node.inputs[1]), shapes.numbers(node.inputs[2])
    count = shapes.shape(node.inputs[1])
    named = len(node.inputs) > 3 and node.inputs[3] is not None
    axes = as_integers(shapes.numbers(node.inputs[3])) if named else None
    if not named and count is not None and len(count) == 1 and count[0] is not None:
        axes = list(range(count[0].number or 0))
    steps = as_integers(shapes.numbers(node.inputs[4])) if len(node.inputs) > 4 else None
    result = list(shape)
    for index, axis in enumerate(axes if axes is not None else []):
        result[axis] = None
        if starts is not None and ends is not None and (steps is None or steps[index] == 1):
            result[axis] = _span(shape[axis], starts[index], ends[index])
    return [tuple(result) if axes is not None else (None,) * len(shape)]


def _span(size: Length | None, start: Length | None, end: Length | None) -> Length | None:
    """Return the length of the slice [start, end) of an axis of this size; None if it is unknown."""
    if size is None or start is None or end is None:
        return None
    first, last = (_position(size, bound) for bound in (start, end))
    if first is None or last is None:
        return None
    span = last - first
    return span if span.number is None or span.number >= 0 else Length(0)


def _position(size: Length, bound: Length) -> Length | None:
    """Return a slice bound counted from the beginning and clipped to the axis; -(L + 64) counts from the end."""
    if any(count < 0 for _, count in bound.terms) or (bound.number or 0) < 0:
        bound = size + bound
    beyond = (bound - size).number
    if beyond is not None:
        return size if beyond > 0 else bound
    if bound.number is not None:
        return bound if bound.number < 2**31 else size
    return None


def _split(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axis = node.attributes.get_int("axis", 0) % len(shape)
    count, length = len(node.outputs), shape[axis]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = shapes.numbers(node.inputs[1])
        parts = list(sizes) if sizes is not None else [None] * count
    else:
        parts = [length.over(count) if length is not None else None] * count
        if length is not None and length.number is not None and length.number % count:
            each = -(-length.number // count)  # the last part is the smallest
            parts = [Length(max(0, min(each, length.number - each * index))) for index in range(count)]
    return [(*shape[:axis], part, *shape[axis + 1 :]) for part in parts]


def _gather(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axis, indices = node.attributes.get_int("axis", 0) % len(shape), shapes.shape(node.inputs[1])
    return [None if indices is None else shape[:axis] + indices + shape[axis + 1 :]]


def _concat(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    parts = [shapes.shape(value) for value in node.inputs]
    axis = node.attributes["axis"].as_int() % len(shape)
    known = [part for part in parts if part is not None]
    if len(known) != len(parts):
        return [None]
    total: Length | None = Length(0)
    for part in known:
        length = part[axis]
        total = None if total is None or length is None else total + length
    for index in range(len(shape)):
        if index != axis and len({part[index] for part in known} - {None}) > 1:
            raise ValueError(f"axes {', '.join(str(part[index]) for part in known)} are incompatible")
    merged = [next((part[index] for part in known if part[index] is not None), None) for index in range(len(shape))]
    return [(*merged[:axis], total, *merged[axis + 1 :])]


def _expand(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    target = shapes.numbers(node.inputs[1])
    return [None if target is None else broadcast_all([shape, tuple(target)])]


def _pad(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    """Return each axis with its padding before and after; a negative pad removes entries."""
    pads = shapes.numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    axes: list[int] | None = list(range(len(shape)))
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        axes = as_integers(shapes.numbers(node.inputs[3]))
    if pads is None or axes is None or pads.size != 2 * len(axes):
        return [(None,) * len(shape)]
    result = list(shape)
    for index, axis in enumerate(axes):
        length, before, after = shape[axis], pads.reshape(-1)[index], pads.reshape(-1)[index + len(axes)]
        known = length is not None and isinstance(before, Length) and isinstance(after, Length)
        result[axis] = length + before + after if known else None
    return [tuple(result)]


def _tile(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    repeats = shapes.numbers(node.inputs[1])
    if repeats is None or repeats.size != len(shape):
        return [(None,) * len(shape)]
    pairs = zip(shape, repeats.reshape(-1), strict=True)
    return [tuple(length.times(count) if length is not None and isinstance(count, Length) else None
                  for length, count in pairs)]  # fmt: skip


def _flatten(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    axis = node.attributes.get_int("axis", 1) % (len(shape) + 1)
    return [(element_count(shape[:axis]), element_count(shape[axis:]))]


def _constant_of_shape(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    sizes = shapes.numbers(node.inputs[0])
    return [None if sizes is None else tuple(sizes)]


def _matmul(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    second = shapes.shape(node.inputs[1])
    if second is None or len(shape) < 2 or len(second) < 2:
        return [None]
    broadcast(shape[-1], second[-2])
    return [(*broadcast_all([shape[:-2], second[:-2]]), shape[-2], second[-1]) if len(shape) + len(second) > 4 else
            (shape[0], second[1])]  # fmt: skip


def _gemm(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    second = shapes.shape(node.inputs[1])
    rows = shape[1 if node.attributes.get_int("transA", 0) else 0]
    return [None if second is None else (rows, second[0 if node.attributes.get_int("transB", 0) else 1])]


def _conv(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    kernel = shapes.shape(node.inputs[1])
    if kernel is None:
        return [None]
    plain = all(length == Length(1) for length in kernel[2:])
    return [(shape[0], kernel[0], *(shape[2:] if plain else (None,) * (len(shape) - 2)))]


def _range(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    start, end, step = (shapes.numbers(value) for value in node.inputs)
    counts = [bound is not None and isinstance(bound.reshape(-1)[0], Length) for bound in (start, end, step)]
    if not all(counts) or as_integers(start) != [0] or as_integers(step) != [1] or end is None:
        return [(None,)]
    return [(end.reshape(-1)[0],)]


def _einsum(shapes: ShapeLookup, node: ir.Node, shape: Shape) -> list[Shape | None]:
    terms, _, output = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    known: dict[str, Length | None] = {}
    for term, value in zip(terms.split(","), node.inputs, strict=True):
        axes = shapes.shape(value)
        if axes is None or len(axes) != len(term):
            return [None]
        known.update(zip(term, axes, strict=True))
    return [tuple(known[letter] for letter in output)]


RULES: dict[str, Callable[[ShapeLookup, ir.Node, Shape], Sequence[Shape | None]]] = {
    "Transpose": _transpose, "ReduceMax": _reduce, "ReduceMean": _reduce, "ReduceSum": _reduce, "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze, "Reshape": _reshape, "Slice": _slice, "Split": _split, "Gather": _gather,
    "Concat": _concat, "Expand": _expand, "MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Range": _range,
    "Einsum": _einsum, "Pad": _pad, "Tile": _tile, "Flatten": _flatten, "ConstantOfShape": _constant_of_shape,
    "ReduceMin": _reduce, "ReduceL2": _reduce, "ReduceProd": _reduce, "ReduceSumSquare": _reduce,
    **dict.fromkeys(("CastLike", "DequantizeLinear", "LayerNormalization", "QuantizeLinear", "RMSNormalization"),
                    lambda shapes, node, shape: [shape]),
}  # fmt: skip
