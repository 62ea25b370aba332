"""Find, by structure and never by name, the parts of a graph that must stay in fp32.

Each finder takes a sorted graph and returns nodes. Why these (build/FACTS.md, Precision): the variance
of an RMSNorm overflows fp16; Fourier angles reach 62,832 rad; rotary angles are unsafe below fp32; and near
sigma = 1 the timestep features flush to one value in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.rotary_table import reads_baked_table

SCALAR_INPUTS = frozenset({"t", "seconds_total"})
LATENT = "x"
MOVERS = frozenset(
    (
        "Slice",
        "Split",
        "Concat",
        "Transpose",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Identity",
        "Neg",
        "Gather",
        "Where",
        "Pad",
        "Flatten",
        "Tile",
    )
)
# What a trunk is made of besides them. Anything else may need fp32 for a reason that nobody has looked into.
TRUNK_OPS = MOVERS | {
    "Abs",
    "Add",
    "Cast",
    "Conv",
    "DequantizeLinear",
    "Div",
    "Gemm",
    "MatMul",
    "Mul",
    "QuantizeLinear",
    "ReduceMax",
    "Sigmoid",
    "Softmax",
    "Sub",
}
NORM_OPS = ("ReduceMean", "Pow", "Sqrt", "Reciprocal")


@dataclass(frozen=True)
class Islands:
    """Nodes that stay fp32, by what they belong to."""

    norms: frozenset[ir.Node]
    norm_count: int
    front_end: frozenset[ir.Node]
    rotary: frozenset[ir.Node]
    other: frozenset[ir.Node] = frozenset()

    def all(self) -> frozenset[ir.Node]:
        """Every island node."""
        return self.norms | self.front_end | self.rotary | self.other


def find_dit_islands(model: ir.Model) -> Islands:
    """The fp32 islands of a DiT.

    Raises GraphNotRecognised when one kind is absent, or when a node of the trunk is none that a DiT has: then it is no
    DiT that we know, and what would become of its precision is a guess.
    """
    behind = query.graph_inputs_behind(model)
    norms, count = rms_norms(model)
    front_end = frozenset(
        node
        for node in model.graph
        if behind[node] and behind[node] <= SCALAR_INPUTS and is_float(node) and not _leaves_fp32(node)
    )
    rotary = rotary_rotations(model, behind)
    if not norms:
        raise GraphNotRecognised("no RMSNorm chain (x^2, ReduceMean, Add, Sqrt, divide, multiply) was found")
    if not any(node.op_type == "Sin" for node in front_end):
        raise GraphNotRecognised("no Fourier features of t and seconds_total were found")
    if not rotary:
        raise GraphNotRecognised("no rotary position embedding was found")
    constants = _constants_of(front_end | rotary | norms, behind)
    found = Islands(norms, count, front_end, rotary, constants)
    _require_known_trunk(model, behind, found.all())
    return found


def find_decoder_islands(model: ir.Model) -> Islands:
    """The fp32 islands of a SAME decoder: rotation, sin(pi g) gates, and all from the last Conv to the samples."""
    behind = query.graph_inputs_behind(model)
    rotary = rotary_rotations(model, behind)
    gates = {node for node in model.graph if node.op_type == "Sin" and behind[node]}
    around = {use.node for gate in gates for use in gate.outputs[0].uses()}
    # The product that makes the gate's angle stays too: rounding of g to fp16 is multiplied by pi and carried on.
    angles = query.ancestors(
        [gate.inputs[0] for gate in gates], stop=lambda node: node.op_type in query.PRODUCTS or node.op_type == "Tanh"
    )
    convs = [node for node in model.graph if node.op_type == "Conv"]
    if not convs or not rotary:
        raise GraphNotRecognised("no 1x1 Conv before the samples, or no rotary embedding, was found")
    tail, queue = {convs[-1]}, [convs[-1]]
    while queue:
        for value in queue.pop().outputs:
            fresh = {use.node for use in value.uses()} - tail
            tail |= fresh
            queue.extend(fresh)
    return Islands(frozenset(), 0, frozenset(), rotary, frozenset(gates | around | angles | tail))


def rms_norms(model: ir.Model) -> tuple[frozenset[ir.Node], int]:
    """Nodes of every RMSNorm chain from x^2 to the product with gamma, and the number of chains.

    Casts are seen through.
    x^2 is Pow(x, 2) or Mul(x, x); the inverse root is Sqrt + Reciprocal, Sqrt + Div, or Pow(-0.5).
    """
    nodes: set[ir.Node] = set()
    count = 0
    for mean in model.graph:
        if mean.op_type != "ReduceMean":
            continue
        square = _through_casts_up(mean.inputs[0])
        source = _squared(square) if square is not None else None
        if square is None or source is None:
            continue
        chain = _norm_tail(mean, source)
        if chain is not None:
            nodes.update((square, mean, *chain))
            count += 1
    return frozenset(nodes), count


def rotary_rotations(model: ir.Model, behind: Mapping[ir.Node, frozenset[str]]) -> frozenset[ir.Node]:
    """The rotary table (float nodes that depend on no data) and the products and sums that rotate by it."""
    tables = {
        node
        for node in model.graph
        if not behind[node]
        and is_float(node)
        and node.op_type not in ("Constant", "ConstantOfShape")
        and not _leaves_fp32(node)
    }
    trig = {node for node in tables if node.op_type in ("Cos", "Sin") or reads_baked_table(node)}
    if not trig:
        return frozenset()
    # A length is read from rotated tensors too: what Shape gives is made of no table.
    made_of_trig = {
        node for node in tables if node in trig or query.ancestors(node.inputs, stop=query.gives_sizes) & trig
    }
    angles = set().union(*(query.ancestors(node.inputs, stop=query.gives_sizes) for node in trig)) & tables
    rotations = {
        node
        for node in model.graph
        if node.op_type == "Mul" and behind[node] and any(_producer(value) in made_of_trig for value in node.inputs)
    }
    sums = {
        node
        for node in model.graph
        if node.op_type == "Add" and all(_through_casts_up(value) in rotations for value in node.inputs)
    }
    return frozenset(made_of_trig | angles | rotations | sums)


def is_float(node: ir.Node) -> bool:
    """Does this node give floating point numbers?"""
    return any(value.dtype is not None and value.dtype.is_floating_point() for value in node.outputs)


def _constants_of(islands: frozenset[ir.Node], behind: Mapping[ir.Node, frozenset[str]]) -> frozenset[ir.Node]:
    """Float nodes that depend on no data and feed an island: a frequency table behind an Unsqueeze must not round."""
    found: set[ir.Node] = set()
    queue = list(islands)
    while queue:
        for value in queue.pop().inputs:
            node = _producer(value)
            if node is None or node in found | islands or behind[node] or not is_float(node) or _leaves_fp32(node):
                continue
            found.add(node)
            queue.append(node)
    return frozenset(found)


def _require_known_trunk(
    model: ir.Model, behind: Mapping[ir.Node, frozenset[str]], islands: frozenset[ir.Node]
) -> None:
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            raise GraphNotRecognised(f"{described(node)} is an op of its own kind")
        if node.op_type == "Range" and _is_short(node.outputs[0]):
            raise GraphNotRecognised(f"{described(node)} counts in {node.outputs[0].dtype}, which ends at 2048")
        if node in islands or not behind[node] or behind[node] <= SCALAR_INPUTS or not is_float(node):
            continue
        if node.op_type in NORM_OPS:
            raise GraphNotRecognised(f"{described(node)} belongs to no RMSNorm chain that is known")
        if node.op_type not in TRUNK_OPS:
            raise GraphNotRecognised(f"{described(node)} is no op that the trunk of a DiT has")


def _is_short(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _leaves_fp32(node: ir.Node) -> bool:
    """A Cast to 16 bits is the shore of an island, not a part of it."""
    return node.op_type == "Cast" and node.outputs[0].dtype != ir.DataType.FLOAT


def _producer(value: ir.Value | None) -> ir.Node | None:
    return value.producer() if value is not None else None


def _through_casts_up(value: ir.Value | None) -> ir.Node | None:
    node = _producer(value)
    while node is not None and node.op_type == "Cast":
        node = _producer(node.inputs[0])
    return node


def _origin(value: ir.Value | None) -> ir.Value | None:
    node = _producer(value)
    while node is not None and node.op_type == "Cast":
        value = node.inputs[0]
        node = _producer(value)
    return value


def _users(node: ir.Node) -> list[ir.Node]:
    return query.users(node, ("Cast",))


def _squared(node: ir.Node) -> ir.Value | None:
    """x when the node is x^2, else None."""
    if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
        return _origin(node.inputs[0])
    if node.op_type == "Pow" and _is_scalar(node.inputs[1], 2.0):
        return _origin(node.inputs[0])
    return None


def _norm_tail(mean: ir.Node, source: ir.Value) -> list[ir.Node] | None:
    """The nodes from the epsilon to the product with gamma, or None when this mean is no RMSNorm."""
    add = _single(_users(mean), "Add")
    root = _single(_users(add), "Sqrt") if add is not None else None
    if add is None or root is None:
        return None
    chain = [add, root]
    inverse = _single(_users(root), "Reciprocal")
    if inverse is not None:
        chain.append(inverse)
        scaled = _single(_users(inverse), "Mul")
    else:
        scaled = _single(_users(root), "Div")
        if scaled is not None and _is_scalar(scaled.inputs[0], 1.0):
            chain.append(scaled)
            scaled = _single(_users(scaled), "Mul")
    if scaled is None or not any(_origin(value) is source for value in scaled.inputs):
        return None
    chain.append(scaled)
    gamma = _single(_users(scaled), "Mul")
    if gamma is not None and any(query.constant_of(_origin(value)) is not None for value in gamma.inputs):
        chain.append(gamma)
    return chain


def _single(nodes: list[ir.Node], op_type: str) -> ir.Node | None:
    matches = [node for node in nodes if node.op_type == op_type]
    return matches[0] if len(matches) == 1 else None


def _is_scalar(value: ir.Value | None, wanted: float) -> bool:
    array = query.constant_of(_origin(value))
    return array is not None and array.size == 1 and bool(np.isclose(float(array.reshape(())), wanted))
