"""Let one attention call serve both halves of differential attention: twice the heads, one softmax."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sa3_build.graph.errors import described
from sa3_build.graph.rewrite import drop_unused_initializers, replace_uses, type_like
from sa3_build.graph.shape_inference import Shapes, followed
from sa3_build.graph.symbolic_dim import Length
from sa3_build.passes.bake_rope import Left
from sa3_build.passes.base import Pass, PassResult
from sa3_build.passes.stack_nodes import Stacker

HEADS = 1  # q, k^T and v are [B, heads, ., .] in front of the products


@dataclass(frozen=True)
class Half:
    """One attention call: softmax(q k^T) v."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    softmax: ir.Node
    result: ir.Node


class StackAttention(Pass):
    """Rewrite attention(q1, k1, v) - attention(q2, k2, v) as one call over [q1, q2], [k1, k2] and [v, v].

    Heads are never mixed, so that each half is the same numbers. Stacking begins as far up as both halves are made
    alike: norm, rotation and scale of q1 and q2 become one each. A k that is transposed by two Reshapes gets a plain
    Transpose first. A call that is no such half is left as it is.
    """

    name = "stack-attention"

    def call(self, model: ir.Model) -> PassResult:
        softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
        before = len(model.graph)
        shapes = followed(model)
        straightened = sum(_straighten(node, shapes, model) for node in list(model.graph) if node.op_type == "Reshape")
        stacker, notes, pairs = Stacker(model, shapes), [], 0
        halves: dict[ir.Node, Half] = {}
        for softmax in softmaxes:
            try:
                half = _half(softmax, shapes)
                halves[half.result] = half
            except Left as why:
                notes.append(str(why))
        for node in [one for one in model.graph if one.op_type == "Sub"]:
            sides = [_behind_transpose(value) for value in node.inputs]
            found = [halves.get(side) for side, _ in sides if side is not None]
            if len(found) != 2 or found[0] is None or found[1] is None:
                continue
            try:
                _stack(model, stacker, node, (found[0], found[1]), [perm for _, perm in sides], shapes)
                pairs += 1
                del halves[found[0].result], halves[found[1].result]
            except Left as why:
                notes.append(str(why))
        if halves:
            first = described(next(iter(halves.values())).softmax)
            notes.append(f"{first} has no second half to be stacked with, and {len(halves) - 1} more have none")
        if pairs or straightened:
            RemoveUnusedNodesPass()(model)
            model.graph.sort()
            drop_unused_initializers(model)
        counts = {"stacked": pairs, "left": len(softmaxes) - 2 * pairs, "straightened": straightened}
        return PassResult(self.name, {**counts, "nodes removed": before - len(model.graph)}, tuple(notes))


def count_pairs(model: ir.Model) -> int:
    """How many differences of two attention calls a graph of any precision holds; nothing is changed."""

    def calls(value: ir.Value | None) -> bool:
        node = _before(value, ("Cast", "Transpose"))
        if node is None or node.op_type != "MatMul":
            return False
        weights = _before(node.inputs[0], ("Cast",))
        return weights is not None and weights.op_type == "Softmax"

    return sum(node.op_type == "Sub" and all(map(calls, node.inputs)) for node in model.graph)


def _before(value: ir.Value | None, seen_through: tuple[str, ...]) -> ir.Node | None:
    """What makes a value, seen through some ops."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in seen_through:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def _half(softmax: ir.Node, shapes: Shapes) -> Half:
    """The attention call around a Softmax. Raises Left when it is none over [B, heads, ., .]."""
    scores = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    users = [use.node for use in softmax.outputs[0].uses()]
    if scores is None or scores.op_type != "MatMul" or len(users) != 1 or users[0].op_type != "MatMul":
        raise Left(f"{described(softmax)} is not between two products")
    operands = (*scores.inputs, users[0].inputs[1])
    if len(scores.outputs[0].uses()) != 1 or users[0].inputs[0] is not softmax.outputs[0]:
        raise Left(f"{described(softmax)} is not the only one that reads its scores")
    q, k, v = operands
    if q is None or k is None or v is None or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise Left(f"{described(softmax)} works along another axis than the last")
    found = [shapes.shape(value) for value in (q, k, v)]
    heads = {shape[HEADS] for shape in found if shape is not None and len(shape) == 4}
    if any(shape is None or len(shape) != 4 for shape in found) or len(heads) != 1:
        raise Left(f"{described(softmax)} has no heads that are known")
    (count,) = heads
    if count is None or count.number is None or found[0] is None or found[0][HEADS] != count:
        raise Left(f"{described(softmax)} has no number of heads that is known")
    return Half(q, k, v, softmax, users[0])


def _stack(
    model: ir.Model, stacker: Stacker, difference: ir.Node, halves: tuple[Half, Half],
    perms: list[tuple[int, ...] | None], shapes: Shapes,
) -> None:  # fmt: skip
    first, second = halves
    if first.v is not second.v:
        raise Left(f"{described(difference)} subtracts two calls that have each a v of its own")
    if perms[0] != perms[1]:
        raise Left(f"{described(difference)} subtracts two calls that are transposed differently")
    for mine, theirs in ((first.q, second.q), (first.k, second.k)):
        if shapes.shape(mine) != shapes.shape(theirs):
            raise Left(f"{described(difference)} subtracts two calls of different shapes")
    heads = (shapes.shape(first.v) or ())[HEADS]
    assert heads is not None and heads.number is not None
    q, k, v = (stacker.stacked(a, b, HEADS) for a, b in ((first.q, second.q), (first.k, second.k), (first.v, first.v)))
    name = f"{difference.outputs[0].name}_stacked"
    scores = ir.node("MatMul", [q, k], name=f"{name}_scores")
    softmax = ir.node("Softmax", scores.outputs, {"axis": -1}, name=f"{name}_softmax")
    both = ir.node("MatMul", [softmax.outputs[0], v], name=f"{name}_values")
    sizes = stacker.vector([heads.number] * 2)
    parts = ir.node("Split", [both.outputs[0], sizes], {"axis": HEADS}, num_outputs=2, name=f"{name}_halves")
    rest = ir.node("Sub", parts.outputs, name=f"{name}_difference")
    chain = [scores, softmax, both, parts, rest]
    if perms[0] is not None:
        chain.append(ir.node("Transpose", rest.outputs, {"perm": list(perms[0])}, name=f"{name}_transpose"))
    for node in chain:
        for place, value in enumerate(node.outputs):
            value.name = f"{node.name}_value_{place}"
            type_like(value, difference.outputs[0])
    chain[-1].outputs[0].shape = difference.outputs[0].shape
    model.graph.extend(chain)
    replace_uses(difference.outputs[0], chain[-1].outputs[0])


def _behind_transpose(value: ir.Value | None) -> tuple[ir.Node | None, tuple[int, ...] | None]:
    """What makes a value, seen through one Transpose, and how that permutes."""
    node = value.producer() if value is not None else None
    perm = node.attributes.get("perm") if node is not None and node.op_type == "Transpose" else None
    if node is None or perm is None or node.inputs[0] is None:
        return node, None
    return node.inputs[0].producer(), tuple(perm.as_ints())


def _straighten(last: ir.Node, shapes: Shapes, model: ir.Model) -> bool:
    """Reshape [B, H, T, D] -> [BH, T, D], Transpose, Reshape -> [B, H, D, T] is one Transpose; make it that."""
    turn = last.inputs[0].producer() if last.inputs[0] is not None else None
    flat = turn.inputs[0].producer() if turn is not None and turn.op_type == "Transpose" and turn.inputs[0] else None
    if turn is None or flat is None or flat.op_type != "Reshape" or flat.inputs[0] is None:
        return False
    source, middle, result = (shapes.shape(node) for node in (flat.inputs[0], flat.outputs[0], last.outputs[0]))
    if source is None or middle is None or result is None or len(source) != 4 or len(middle) != 3 or None in source:
        return False
    perm = turn.attributes.get("perm")
    if perm is None or tuple(perm.as_ints()) != (0, 2, 1) or middle[1:] != source[2:]:
        return False
    if result != (*source[:2], source[3], source[2]):
        return False
    before = flat.inputs[0].producer()
    order, data = [0, 1, 3, 2], flat.inputs[0]
    earlier = before.attributes.get("perm") if before is not None and before.op_type == "Transpose" else None
    if before is not None and earlier is not None and before.inputs[0] is not None:
        order, data = [list(earlier.as_ints())[axis] for axis in order], before.inputs[0]
    plain = ir.node("Transpose", [data], {"perm": order}, name=f"{last.outputs[0].name}_plain")
    value = plain.outputs[0]
    value.name = f"{plain.name}_value"
    type_like(value, last.outputs[0])
    value.shape = ir.Shape([one.number if isinstance(one, Length) else None for one in result])
    model.graph.insert_before(last, plain)
    replace_uses(last.outputs[0], value)
    shapes.step(plain)
    return True
