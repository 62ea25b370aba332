"""Compute two tensors that are made alike in one go: concat(f(a), f(b)) becomes f(concat(a, b))."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.rewrite import integers, type_like
from sa3_build.graph.shape_inference import Shapes
from sa3_build.graph.symbolic_dim import Length, Shape

ELEMENTWISE = frozenset(("Add", "Cast", "Div", "Identity", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub"))
ALONG_LAST = frozenset(("Concat", "ReduceMean", "Slice", "Split", "Squeeze"))  # movers and means that name their axis


class Stacker:
    """Builds concat(a, b, axis) for pairs of values of one shape.

    Invariant: what `stacked` returns equals the concatenation, whatever was found above; where the two are not made
    alike any more, a Concat is put in. Nodes are appended; the caller sorts the graph and removes what became unread.
    """

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self._model, self._shapes = model, shapes
        self._done: dict[tuple[ir.Value, ir.Value, int], ir.Value] = {}
        self._count = 0
        self.merged = 0

    def stacked(self, first: ir.Value, second: ir.Value, axis: int) -> ir.Value:
        """concat(first, second) along an axis counted from the front."""
        key = (first, second, axis)
        if key not in self._done:
            found = self._merged(first, second, axis)
            if key in self._done:  # one of several outputs
                return self._done[key]
            if found is None:
                found = self._new("Concat", [first, second], {"axis": axis}, first, axis)
            self._done[key] = found
        return self._done[key]

    def vector(self, numbers: list[int]) -> ir.Value:
        """A new constant of integers."""
        self._count += 1
        return integers(self._model, f"stacked_numbers_{self._count}", numbers)

    def _merged(self, first: ir.Value, second: ir.Value, axis: int) -> ir.Value | None:
        one, other = first.producer(), second.producer()
        shape = self._shapes.shape(first)
        if first is second or one is None or other is None or shape is None or shape != self._shapes.shape(second):
            return None
        if one.op_type != other.op_type or one.outputs.index(first) != other.outputs.index(second):
            return None
        if _attributes(one) != _attributes(other) or len(one.inputs) != len(other.inputs) or None in one.inputs:
            return None
        if one.op_type == "Reshape":
            return self._reshape(one, other, axis)
        if one.op_type == "Transpose":
            perm = one.attributes.get("perm")
            above = list(perm.as_ints())[axis] if perm is not None else len(shape) - 1 - axis
            return self._apply(one, other, axis, [above])
        if one.op_type in ELEMENTWISE:
            return self._apply(one, other, axis, [axis] * len(one.inputs))
        if one.op_type in ALONG_LAST and self._other_axis(one, axis):
            data = len(one.inputs) if one.op_type == "Concat" else 1
            return self._apply(one, other, axis, [axis] * data)
        return None

    def _apply(self, one: ir.Node, other: ir.Node, axis: int, axes: list[int]) -> ir.Value | None:
        """The same node on stacked operands; an operand that both share, and that has no heads, stays."""
        rank = len(self._shapes.shape(one.outputs[0]) or ())
        pairs: list[tuple[ir.Value, ir.Value] | None] = []
        for place, (mine, theirs) in enumerate(zip(one.inputs, other.inputs, strict=True)):
            assert mine is not None and theirs is not None
            if place >= len(axes):
                if not self._same(mine, theirs):
                    return None
                pairs.append(None)
                continue
            shape = self._shapes.shape(mine)
            if shape is None or shape != self._shapes.shape(theirs):
                return None
            at = axis - (rank - len(shape)) if one.op_type in ELEMENTWISE else axes[place]
            if at < 0 or (shape[at] == Length(1) and one.op_type in ELEMENTWISE):
                if not self._same(mine, theirs):
                    return None
                pairs.append(None)
            else:
                pairs.append((mine, theirs))
                axes[place] = at
        if not any(pairs):
            return None
        operands = [
            self.stacked(*pair, axes[place]) if pair is not None else one.inputs[place]
            for place, pair in enumerate(pairs)
        ]
        return self._twin(one, other, operands, axis)

    def _twin(self, one: ir.Node, other: ir.Node, operands: list[ir.Value | None], axis: int) -> ir.Value:
        self._count += 1
        self.merged += 1
        twin = ir.node(
            one.op_type, operands, dict(one.attributes), num_outputs=len(one.outputs),
            name=f"stacked_{self._count}_{one.op_type}",
        )  # fmt: skip
        for place, result in enumerate(twin.outputs):
            self._describe(result, one.outputs[place], axis, f"{twin.name}_value_{place}")
            self._done[one.outputs[place], other.outputs[place], axis] = result
        self._model.graph.append(twin)
        return self._done[one.outputs[0], other.outputs[0], axis]

    def _reshape(self, one: ir.Node, other: ir.Node, axis: int) -> ir.Value | None:
        before, after = self._shapes.shape(one.inputs[0]), self._shapes.shape(one.outputs[0])
        data, twin = one.inputs[0], other.inputs[0]
        if before is None or after is None or data is None or twin is None or before != self._shapes.shape(twin):
            return None
        heads = after[axis]
        tail = [length.number if length is not None else None for length in after[axis + 1 :]]
        if heads is None or heads.number is None or None in tail:
            return None
        target = [0] * axis + [2 * heads.number, *(size for size in tail if size is not None)]
        if before[: axis + 1] == after[: axis + 1]:
            above = self.stacked(data, twin, axis)
        elif len(before) == axis + 1 and before[:axis] == after[:axis]:
            found = self._neighbours(data, twin, axis)
            if found is None:
                return None
            above = found
        else:
            return None
        self.merged += 1
        return self._new("Reshape", [above, self.vector(target)], {"allowzero": 0}, one.outputs[0], axis)

    def _neighbours(self, first: ir.Value, second: ir.Value, axis: int) -> ir.Value | None:
        """Two parts of one Split that lie side by side: the Split gives them as one part from now on."""
        split = first.producer()
        if split is None or split.op_type != "Split" or second.producer() is not split:
            return None
        place, sizes = split.outputs.index(first), [_number(self._shapes, value) for value in split.outputs]
        if split.outputs.index(second) != place + 1 or None in sizes:
            return None
        if split.attributes.get_int("axis", 0) not in (axis, -1):
            return None
        parts = [size for size in sizes if size is not None]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        self._count += 1
        wider = ir.node(
            "Split", [split.inputs[0], self.vector(parts)], {"axis": axis}, num_outputs=len(parts),
            name=f"stacked_{self._count}_Split",
        )  # fmt: skip
        old = [value for index, value in enumerate(split.outputs) if index != place + 1]
        for index, (result, part) in enumerate(zip(wider.outputs, old, strict=True)):
            self._describe(result, part, axis if index == place else None, f"{wider.name}_value_{index}")
        self._model.graph.append(wider)
        self._shapes.step(wider)
        for result, part in zip(wider.outputs, old, strict=True):
            if part is not first:
                for use in list(part.uses()):
                    use.node.replace_input_with(use.idx, result)
        return wider.outputs[place]

    def _other_axis(self, node: ir.Node, axis: int) -> bool:
        """Does this node work along other axes than the one of the heads, and keep that axis where it is?"""
        rank = len(self._shapes.shape(node.inputs[0]) or ())
        if node.op_type in ("Concat", "Split"):
            return bool(rank) and node.attributes.get_int("axis", 0) % rank != axis
        place = 3 if node.op_type == "Slice" else 1
        found = query.constant_of(node.inputs[place]) if len(node.inputs) > place else None
        if not rank or found is None:
            return False
        axes = [int(one) % rank for one in found.reshape(-1)]
        keeps = node.op_type != "Squeeze" or min(axes) > axis
        return axis not in axes and keeps and bool(node.attributes.get_int("keepdims", 1))

    def _same(self, first: ir.Value | None, second: ir.Value | None) -> bool:
        """Do two values hold the same numbers, as far as can be seen?"""
        if first is second:
            return True
        if first is None or second is None or first.dtype != second.dtype:
            return False
        mine, theirs = query.constant_of(first), query.constant_of(second)
        if mine is not None or theirs is not None:
            return mine is not None and theirs is not None and np.array_equal(mine, theirs)
        numbers, others = (self._entries(value) for value in (first, second))
        if numbers is not None and others is not None:
            return numbers == others
        one, other = first.producer(), second.producer()
        if one is None or other is None or one.op_type != other.op_type or _attributes(one) != _attributes(other):
            return False
        alike = len(one.inputs) == len(other.inputs) and one.outputs.index(first) == other.outputs.index(second)
        return alike and all(map(self._same, one.inputs, other.inputs))

    def _entries(self, value: ir.Value) -> list[object] | None:
        numbers = self._shapes.numbers(value)
        entries = None if numbers is None else list(numbers.reshape(-1))
        return None if entries is None or None in entries else entries

    def _new(
        self, op_type: str, inputs: list[ir.Value], attributes: dict[str, int], like: ir.Value, axis: int
    ) -> ir.Value:
        self._count += 1
        node = ir.node(op_type, inputs, attributes, name=f"stacked_{self._count}_{op_type}")
        self._describe(node.outputs[0], like, axis, f"{node.name}_value")
        self._model.graph.append(node)
        return node.outputs[0]

    def _describe(self, value: ir.Value, like: ir.Value, doubled: int | None, name: str) -> None:
        """Name and type of a new value, and its shape: that of `like` with one axis twice as long."""
        value.name = name
        type_like(value, like)
        shape: Shape | None = self._shapes.shape(like)
        if shape is not None:
            numbers = [length.number if length is not None else None for length in shape]
            if doubled is not None and numbers[doubled] is not None:
                numbers[doubled] = 2 * (numbers[doubled] or 0)
            stated = like.shape if like.shape is not None and len(like.shape) == len(shape) else [None] * len(shape)
            value.shape = ir.Shape([n if n is not None else s for n, s in zip(numbers, stated, strict=True)])


def _number(shapes: Shapes, value: ir.Value) -> int | None:
    shape = shapes.shape(value)
    return shape[-1].number if shape and shape[-1] is not None else None


def _attributes(node: ir.Node) -> dict[str, object]:
    found = {name: attribute.value for name, attribute in node.attributes.items() if name != "allowzero"}
    return {name: value.tobytes() if isinstance(value, ir.TensorProtocol) else value for name, value in found.items()}
