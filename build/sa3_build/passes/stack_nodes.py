"""Merge equal computations on two tensors: concat(f(a), f(b)) becomes f(concat(a, b))."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.rewrite import integers, type_like
from sa3_build.graph.shape_inference import Shapes
from sa3_build.graph.symbolic_dim import Length, Shape

ELEMENTWISE = frozenset(("Add", "Cast", "Div", "Identity", "Mul", "Neg", "Pow", "Reciprocal", "Sqrt", "Sub"))
ALONG_LAST = frozenset(("Concat", "ReduceMean", "Slice", "Split", "Squeeze"))  # ops with an explicit axis


class Stacker:
    """Builder of concat(a, b, axis) for pairs of values of one shape.

    Invariant: the result of `stacked` equals the concatenation. Where the two are no longer computed by equal nodes, a
    Concat is inserted. Nodes are appended; the caller sorts the graph and removes unused nodes.
    """

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self._model, self._shapes = model, shapes
        self._done: dict[tuple[ir.Value, ir.Value, int], ir.Value] = {}
        self._count = 0
        self.merged = 0

    def stacked(self, first: ir.Value, second: ir.Value, axis: int) -> ir.Value:
        """Return concat(first, second) along an axis counted from the front."""
        key = (first, second, axis)
        if key not in self._done:
            result = self._merged(first, second, axis)
            if key in self._done:  # one of several outputs
                return self._done[key]
            if result is None:
                result = self._new("Concat", [first, second], {"axis": axis}, first, axis)
            self._done[key] = result
        return self._done[key]

    def vector(self, numbers: list[int]) -> ir.Value:
        """Return a new int64 initializer."""
        self._count += 1
        return integers(self._model, f"stacked_numbers_{self._count}", numbers)

    def _merged(self, first: ir.Value, second: ir.Value, axis: int) -> ir.Value | None:
        node, partner = first.producer(), second.producer()
        shape = self._shapes.shape(first)
        if first is second or node is None or partner is None or shape is None or shape != self._shapes.shape(second):
            return None
        if node.op_type != partner.op_type or node.outputs.index(first) != partner.outputs.index(second):
            return None
        if _attributes(node) != _attributes(partner) or len(node.inputs) != len(partner.inputs) or None in node.inputs:
            return None
        if node.op_type == "Reshape":
            return self._reshape(node, partner, axis)
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            input_axis = list(perm.as_ints())[axis] if perm is not None else len(shape) - 1 - axis
            return self._apply(node, partner, axis, [input_axis])
        if node.op_type in ELEMENTWISE:
            return self._apply(node, partner, axis, [axis] * len(node.inputs))
        if node.op_type in ALONG_LAST and self._other_axis(node, axis):
            data = len(node.inputs) if node.op_type == "Concat" else 1
            return self._apply(node, partner, axis, [axis] * data)
        return None

    def _apply(self, node: ir.Node, partner: ir.Node, axis: int, axes: list[int]) -> ir.Value | None:
        """Return the same node on stacked operands; an operand that both share and that has no heads is not stacked."""
        rank = len(self._shapes.shape(node.outputs[0]) or ())
        pairs: list[tuple[ir.Value, ir.Value] | None] = []
        for index, (operand, partner_operand) in enumerate(zip(node.inputs, partner.inputs, strict=True)):
            assert operand is not None and partner_operand is not None
            if index >= len(axes):
                if not self._same(operand, partner_operand):
                    return None
                pairs.append(None)
                continue
            shape = self._shapes.shape(operand)
            if shape is None or shape != self._shapes.shape(partner_operand):
                return None
            operand_axis = axis - (rank - len(shape)) if node.op_type in ELEMENTWISE else axes[index]
            if operand_axis < 0 or (shape[operand_axis] == Length(1) and node.op_type in ELEMENTWISE):
                if not self._same(operand, partner_operand):
                    return None
                pairs.append(None)
            else:
                pairs.append((operand, partner_operand))
                axes[index] = operand_axis
        if not any(pairs):
            return None
        operands = [
            self.stacked(*pair, axes[index]) if pair is not None else node.inputs[index]
            for index, pair in enumerate(pairs)
        ]
        return self._twin(node, partner, operands, axis)

    def _twin(self, node: ir.Node, partner: ir.Node, operands: list[ir.Value | None], axis: int) -> ir.Value:
        self._count += 1
        self.merged += 1
        merged = ir.node(
            node.op_type, operands, dict(node.attributes), num_outputs=len(node.outputs),
            name=f"stacked_{self._count}_{node.op_type}",
        )  # fmt: skip
        for index, result in enumerate(merged.outputs):
            self._describe(result, node.outputs[index], axis, f"{merged.name}_value_{index}")
            self._done[node.outputs[index], partner.outputs[index], axis] = result
        self._model.graph.append(merged)
        return self._done[node.outputs[0], partner.outputs[0], axis]

    def _reshape(self, node: ir.Node, partner: ir.Node, axis: int) -> ir.Value | None:
        before, after = self._shapes.shape(node.inputs[0]), self._shapes.shape(node.outputs[0])
        data, partner_data = node.inputs[0], partner.inputs[0]
        if (
            before is None
            or after is None
            or data is None
            or partner_data is None
            or before != self._shapes.shape(partner_data)
        ):
            return None
        heads = after[axis]
        tail = [length.number if length is not None else None for length in after[axis + 1 :]]
        if heads is None or heads.number is None or None in tail:
            return None
        target = [0] * axis + [2 * heads.number, *(size for size in tail if size is not None)]
        if before[: axis + 1] == after[: axis + 1]:
            stacked_data = self.stacked(data, partner_data, axis)
        elif len(before) == axis + 1 and before[:axis] == after[:axis]:
            parts = self._neighbours(data, partner_data, axis)
            if parts is None:
                return None
            stacked_data = parts
        else:
            return None
        self.merged += 1
        return self._new("Reshape", [stacked_data, self.vector(target)], {"allowzero": 0}, node.outputs[0], axis)

    def _neighbours(self, first: ir.Value, second: ir.Value, axis: int) -> ir.Value | None:
        """Return two adjacent outputs of one Split as one output of a new Split; None if they are not adjacent."""
        split = first.producer()
        if split is None or split.op_type != "Split" or second.producer() is not split:
            return None
        position, sizes = split.outputs.index(first), [_number(self._shapes, value) for value in split.outputs]
        if split.outputs.index(second) != position + 1 or None in sizes:
            return None
        if split.attributes.get_int("axis", 0) not in (axis, -1):
            return None
        parts = [size for size in sizes if size is not None]
        parts[position : position + 2] = [parts[position] + parts[position + 1]]
        self._count += 1
        wider = ir.node(
            "Split", [split.inputs[0], self.vector(parts)], {"axis": axis}, num_outputs=len(parts),
            name=f"stacked_{self._count}_Split",
        )  # fmt: skip
        old = [value for index, value in enumerate(split.outputs) if index != position + 1]
        for index, (result, part) in enumerate(zip(wider.outputs, old, strict=True)):
            self._describe(result, part, axis if index == position else None, f"{wider.name}_value_{index}")
        self._model.graph.append(wider)
        self._shapes.step(wider)
        for result, part in zip(wider.outputs, old, strict=True):
            if part is not first:
                for use in list(part.uses()):
                    use.node.replace_input_with(use.idx, result)
        return wider.outputs[position]

    def _other_axis(self, node: ir.Node, axis: int) -> bool:
        """Return True if a node operates on other axes than `axis` and keeps that axis in place."""
        rank = len(self._shapes.shape(node.inputs[0]) or ())
        if node.op_type in ("Concat", "Split"):
            return bool(rank) and node.attributes.get_int("axis", 0) % rank != axis
        axes_input = 3 if node.op_type == "Slice" else 1
        node_axes = query.constant_of(node.inputs[axes_input]) if len(node.inputs) > axes_input else None
        if not rank or node_axes is None:
            return False
        axes = [int(entry) % rank for entry in node_axes.reshape(-1)]
        keeps = node.op_type != "Squeeze" or min(axes) > axis
        return axis not in axes and keeps and bool(node.attributes.get_int("keepdims", 1))

    def _same(self, first: ir.Value | None, second: ir.Value | None) -> bool:
        """Return True if two values are known to be equal."""
        if first is second:
            return True
        if first is None or second is None or first.dtype != second.dtype:
            return False
        constant, second_constant = query.constant_of(first), query.constant_of(second)
        if constant is not None or second_constant is not None:
            return constant is not None and second_constant is not None and np.array_equal(constant, second_constant)
        numbers, second_numbers = (self._entries(value) for value in (first, second))
        if numbers is not None and second_numbers is not None:
            return numbers == second_numbers
        node, partner = first.producer(), second.producer()
        if (
            node is None
            or partner is None
            or node.op_type != partner.op_type
            or _attributes(node) != _attributes(partner)
        ):
            return False
        same_form = len(node.inputs) == len(partner.inputs) and node.outputs.index(first) == partner.outputs.index(
            second
        )
        return same_form and all(map(self._same, node.inputs, partner.inputs))

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
        """Set name and type of a new value, and its shape: that of `like` with the axis `doubled` twice as long."""
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
    values = {name: attribute.value for name, attribute in node.attributes.items() if name != "allowzero"}
    return {name: value.tobytes() if isinstance(value, ir.TensorProtocol) else value for name, value in values.items()}
