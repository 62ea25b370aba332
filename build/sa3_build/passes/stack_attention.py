"""Compute both halves of differential attention in one call: twice the heads, one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sa3_build.graph.errors import described
from sa3_build.graph.rewrite import drop_unused_initializers, replace_uses, type_like
from sa3_build.graph.shape_inference import Shapes, followed
from sa3_build.graph.symbolic_dim import Length
from sa3_build.passes.bake_rope import NotMatched
from sa3_build.passes.base import Pass, PassResult
from sa3_build.passes.stack_nodes import Stacker

HEADS = 1  # axis of the heads in q, k^T and v: [B, heads, ., .]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call: softmax(q k^T) v."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    softmax: ir.Node
    result: ir.Node


class StackAttention(Pass):
    """Rewrite attention(q1, k1, v) - attention(q2, k2, v) as one call over [q1, q2], [k1, k2] and [v, v].

    Heads are not mixed, so that each half has the same values as before. Stacking starts as far upstream as both halves
    have equal nodes: norm, rotation and scale of q1 and q2 become one node each. A k that is transposed by two Reshapes
    is first rewritten to a single Transpose. Calls that do not match stay.
    """

    name = "stack-attention"

    def call(self, model: ir.Model) -> PassResult:
        softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
        before = len(model.graph)
        shapes = followed(model)
        simplified = sum(
            _simplify_transpose(node, shapes, model) for node in list(model.graph) if node.op_type == "Reshape"
        )
        stacker, notes, pairs = Stacker(model, shapes), [], 0
        calls: dict[ir.Node, AttentionCall] = {}
        for softmax in softmaxes:
            try:
                call = _attention_call(softmax, shapes)
                calls[call.result] = call
            except NotMatched as reason:
                notes.append(str(reason))
        for node in [node for node in model.graph if node.op_type == "Sub"]:
            sides = [_behind_transpose(value) for value in node.inputs]
            pair = [calls.get(side) for side, _ in sides if side is not None]
            if len(pair) != 2 or pair[0] is None or pair[1] is None:
                continue
            try:
                _stack(model, stacker, node, (pair[0], pair[1]), [perm for _, perm in sides], shapes)
                pairs += 1
                del calls[pair[0].result], calls[pair[1].result]
            except NotMatched as reason:
                notes.append(str(reason))
        if calls:
            first = described(next(iter(calls.values())).softmax)
            notes.append(f"{first} and {len(calls) - 1} more attention calls have no partner to be stacked with")
        if pairs or simplified:
            RemoveUnusedNodesPass()(model)
            model.graph.sort()
            drop_unused_initializers(model)
        counts = {"stacked": pairs, "not_matched": len(softmaxes) - 2 * pairs, "simplified": simplified}
        return PassResult(self.name, {**counts, "nodes_removed": before - len(model.graph)}, tuple(notes))


def count_pairs(model: ir.Model) -> int:
    """Return the number of differences of two attention calls in a graph of any precision, without changing it."""

    def calls(value: ir.Value | None) -> bool:
        node = _before(value, ("Cast", "Transpose"))
        if node is None or node.op_type != "MatMul":
            return False
        weights = _before(node.inputs[0], ("Cast",))
        return weights is not None and weights.op_type == "Softmax"

    return sum(node.op_type == "Sub" and all(map(calls, node.inputs)) for node in model.graph)


def _before(value: ir.Value | None, seen_through: tuple[str, ...]) -> ir.Node | None:
    """Return the producer of a value, skipping nodes of the op types `seen_through`."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in seen_through:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def _attention_call(softmax: ir.Node, shapes: Shapes) -> AttentionCall:
    """Return the attention call around a Softmax. Raises NotMatched if it is not over [B, heads, ., .]."""
    scores = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    users = [use.node for use in softmax.outputs[0].uses()]
    if scores is None or scores.op_type != "MatMul" or len(users) != 1 or users[0].op_type != "MatMul":
        raise NotMatched(f"{described(softmax)} is not between two MatMul nodes")
    operands = (*scores.inputs, users[0].inputs[1])
    if len(scores.outputs[0].uses()) != 1 or users[0].inputs[0] is not softmax.outputs[0]:
        raise NotMatched(f"{described(softmax)} has scores that another node reads")
    q, k, v = operands
    if q is None or k is None or v is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise NotMatched(f"{described(softmax)} is not along the last axis")
    operand_shapes = [shapes.shape(value) for value in (q, k, v)]
    heads = {shape[HEADS] for shape in operand_shapes if shape is not None and len(shape) == 4}
    if any(shape is None or len(shape) != 4 for shape in operand_shapes) or len(heads) != 1:
        raise NotMatched(f"{described(softmax)} has unknown heads")
    (count,) = heads
    if count is None or count.number is None or operand_shapes[0] is None or operand_shapes[0][HEADS] != count:
        raise NotMatched(f"{described(softmax)} has an unknown number of heads")
    return AttentionCall(q, k, v, softmax, users[0])


def _stack(
    model: ir.Model, stacker: Stacker, difference: ir.Node, calls: tuple[AttentionCall, AttentionCall],
    perms: list[tuple[int, ...] | None], shapes: Shapes,
) -> None:  # fmt: skip
    first, second = calls
    if first.v is not second.v:
        raise NotMatched(f"{described(difference)} subtracts two calls with different v")
    if perms[0] != perms[1]:
        raise NotMatched(f"{described(difference)} subtracts two calls that are transposed differently")
    for a, b in ((first.q, second.q), (first.k, second.k)):
        if shapes.shape(a) != shapes.shape(b):
            raise NotMatched(f"{described(difference)} subtracts two calls of different shapes")
    heads = (shapes.shape(first.v) or ())[HEADS]
    assert heads is not None and heads.number is not None
    q, k, v = (stacker.stacked(a, b, HEADS) for a, b in ((first.q, second.q), (first.k, second.k), (first.v, first.v)))
    name = f"{difference.outputs[0].name}_stacked"
    scores = ir.node("MatMul", [q, k], name=f"{name}_scores")
    softmax = ir.node("Softmax", scores.outputs, {"axis": -1}, name=f"{name}_softmax")
    both = ir.node("MatMul", [softmax.outputs[0], v], name=f"{name}_values")
    sizes = stacker.vector([heads.number] * 2)
    parts = ir.node("Split", [both.outputs[0], sizes], {"axis": HEADS}, num_outputs=2, name=f"{name}_halves")
    difference_of_parts = ir.node("Sub", parts.outputs, name=f"{name}_difference")
    chain = [scores, softmax, both, parts, difference_of_parts]
    if perms[0] is not None:
        chain.append(
            ir.node("Transpose", difference_of_parts.outputs, {"perm": list(perms[0])}, name=f"{name}_transpose")
        )
    for node in chain:
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_value_{index}"
            type_like(value, difference.outputs[0])
    chain[-1].outputs[0].shape = difference.outputs[0].shape
    model.graph.extend(chain)
    replace_uses(difference.outputs[0], chain[-1].outputs[0])


def _behind_transpose(value: ir.Value | None) -> tuple[ir.Node | None, tuple[int, ...] | None]:
    """Return the producer of a value, skipping one Transpose, and the permutation (None without one)."""
    node = value.producer() if value is not None else None
    perm = node.attributes.get("perm") if node is not None and node.op_type == "Transpose" else None
    if node is None or perm is None or node.inputs[0] is None:
        return node, None
    return node.inputs[0].producer(), tuple(perm.as_ints())


def _simplify_transpose(last: ir.Node, shapes: Shapes, model: ir.Model) -> bool:
    """Replace Reshape [B, H, T, D] -> [BH, T, D], Transpose, Reshape -> [B, H, D, T] by one Transpose.

    Returns True if the nodes matched.
    """
    transpose = last.inputs[0].producer() if last.inputs[0] is not None else None
    flatten = (
        transpose.inputs[0].producer()
        if transpose is not None and transpose.op_type == "Transpose" and transpose.inputs[0]
        else None
    )
    if transpose is None or flatten is None or flatten.op_type != "Reshape" or flatten.inputs[0] is None:
        return False
    source, middle, result = (shapes.shape(node) for node in (flatten.inputs[0], flatten.outputs[0], last.outputs[0]))
    if source is None or middle is None or result is None or len(source) != 4 or len(middle) != 3 or None in source:
        return False
    perm = transpose.attributes.get("perm")
    if perm is None or tuple(perm.as_ints()) != (0, 2, 1) or middle[1:] != source[2:]:
        return False
    if result != (*source[:2], source[3], source[2]):
        return False
    before = flatten.inputs[0].producer()
    order, data = [0, 1, 3, 2], flatten.inputs[0]
    earlier = before.attributes.get("perm") if before is not None and before.op_type == "Transpose" else None
    if before is not None and earlier is not None and before.inputs[0] is not None:
        order, data = [list(earlier.as_ints())[axis] for axis in order], before.inputs[0]
    simplified = ir.node("Transpose", [data], {"perm": order}, name=f"{last.outputs[0].name}_plain")
    value = simplified.outputs[0]
    value.name = f"{simplified.name}_value"
    type_like(value, last.outputs[0])
    value.shape = ir.Shape([axis.number if isinstance(axis, Length) else None for axis in result])
    model.graph.insert_before(last, simplified)
    replace_uses(last.outputs[0], value)
    shapes.step(simplified)
    return True
