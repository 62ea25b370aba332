"""Find, by structure and not by name, the parts of a graph that must stay in fp32.

Each finder takes a topologically sorted graph and returns nodes. Reasons (build/FACTS.md, Precision): the variance of
an RMSNorm overflows fp16; Fourier angles reach 62,832 rad; rotary angles are unsafe below fp32; and near sigma = 1 the
timestep features round to one value in 16 bits.
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
        "Slice", "Split", "Concat", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Identity", "Neg",
        "Gather", "Where", "Pad", "Flatten", "Tile",
    )
)  # fmt: skip
# Other ops of a trunk. An op outside this list may need fp32 and has not been studied, so it is refused.
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
    """Nodes that stay fp32, grouped by the part of the network."""

    norms: frozenset[ir.Node]
    norm_count: int
    front_end: frozenset[ir.Node]
    rotary: frozenset[ir.Node]
    other: frozenset[ir.Node] = frozenset()

    def all(self) -> frozenset[ir.Node]:
        """Return every island node."""
        return self.norms | self.front_end | self.rotary | self.other


def find_dit_islands(model: ir.Model) -> Islands:
    """Return the fp32 islands of a DiT.

    Raises GraphNotRecognised when one of the parts is absent, or when the trunk contains an op that a DiT does not
    have: the precision that such a graph needs is unknown.
    """
    dependencies = query.input_dependencies(model)
    norms, count = rms_norms(model)
    front_end = frozenset(
        node
        for node in model.graph
        if dependencies[node] and dependencies[node] <= SCALAR_INPUTS and is_float(node) and not _leaves_fp32(node)
    )
    rotary = rotary_rotations(model, dependencies)
    if not norms:
        raise GraphNotRecognised("no RMSNorm chain (x^2, ReduceMean, Add, Sqrt, divide, multiply)")
    if not any(node.op_type == "Sin" for node in front_end):
        raise GraphNotRecognised("no Fourier features of t and seconds_total")
    if not rotary:
        raise GraphNotRecognised("no rotary position embedding")
    constants = _constants_of(front_end | rotary | norms, dependencies)
    islands = Islands(norms, count, front_end, rotary, constants)
    _require_known_trunk(model, dependencies, islands.all())
    return islands


def find_decoder_islands(model: ir.Model) -> Islands:
    """Return the fp32 islands of a SAME decoder: rotations, sin(pi g) gates and everything from the last Conv on."""
    dependencies = query.input_dependencies(model)
    rotary = rotary_rotations(model, dependencies)
    gates = {node for node in model.graph if node.op_type == "Sin" and dependencies[node]}
    around = {use.node for gate in gates for use in gate.outputs[0].uses()}
    # The GEMM that computes the gate's angle stays too: the fp16 rounding error of g would be multiplied by pi.
    angles = query.ancestors(
        [gate.inputs[0] for gate in gates], stop=lambda node: node.op_type in query.GEMM_OPS or node.op_type == "Tanh"
    )
    convs = [node for node in model.graph if node.op_type == "Conv"]
    if not convs or not rotary:
        raise GraphNotRecognised("no 1x1 Conv before the samples, or no rotary embedding")
    tail, queue = {convs[-1]}, [convs[-1]]
    while queue:
        for value in queue.pop().outputs:
            fresh = {use.node for use in value.uses()} - tail
            tail |= fresh
            queue.extend(fresh)
    return Islands(frozenset(), 0, frozenset(), rotary, frozenset(gates | around | angles | tail))


def rms_norms(model: ir.Model) -> tuple[frozenset[ir.Node], int]:
    """Return the nodes of every RMSNorm chain, from x^2 to the multiplication by gamma, and the number of chains.

    Casts are skipped. x^2 is Pow(x, 2) or Mul(x, x); the inverse root is Sqrt + Reciprocal, Sqrt + Div, or Pow(-0.5).
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


def rotary_rotations(model: ir.Model, dependencies: Mapping[ir.Node, frozenset[str]]) -> frozenset[ir.Node]:
    """Return the rotary table and the Mul and Add nodes that rotate by it.

    The table consists of float nodes that depend on no graph input.
    """
    tables = {
        node
        for node in model.graph
        if not dependencies[node]
        and is_float(node)
        and node.op_type not in ("Constant", "ConstantOfShape")
        and not _leaves_fp32(node)
    }
    trig = {node for node in tables if node.op_type in ("Cos", "Sin") or reads_baked_table(node)}
    if not trig:
        return frozenset()
    # Lengths are read from rotated tensors too: the output of Shape does not depend on the table's values.
    made_of_trig = {
        node for node in tables if node in trig or query.ancestors(node.inputs, stop=query.gives_sizes) & trig
    }
    angles = set().union(*(query.ancestors(node.inputs, stop=query.gives_sizes) for node in trig)) & tables
    rotations = {
        node
        for node in model.graph
        if node.op_type == "Mul"
        and dependencies[node]
        and any(_producer(value) in made_of_trig for value in node.inputs)
    }
    sums = {
        node
        for node in model.graph
        if node.op_type == "Add" and all(_through_casts_up(value) in rotations for value in node.inputs)
    }
    return frozenset(made_of_trig | angles | rotations | sums)


def is_float(node: ir.Node) -> bool:
    """Return True if an output of the node is floating point."""
    return any(value.dtype is not None and value.dtype.is_floating_point() for value in node.outputs)


def _constants_of(islands: frozenset[ir.Node], dependencies: Mapping[ir.Node, frozenset[str]]) -> frozenset[ir.Node]:
    """Return float nodes that depend on no graph input and feed an island.

    A frequency table before an Unsqueeze, say, must not be rounded to fp16.
    """
    constants: set[ir.Node] = set()
    queue = list(islands)
    while queue:
        for value in queue.pop().inputs:
            node = _producer(value)
            if (
                node is None
                or node in constants | islands
                or dependencies[node]
                or not is_float(node)
                or _leaves_fp32(node)
            ):
                continue
            constants.add(node)
            queue.append(node)
    return frozenset(constants)


def _require_known_trunk(
    model: ir.Model, dependencies: Mapping[ir.Node, frozenset[str]], islands: frozenset[ir.Node]
) -> None:
    """Raise GraphNotRecognised for a trunk node outside the islands with an op that a DiT does not have."""
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            raise GraphNotRecognised(f"{described(node)} is an op of a custom domain")
        if node.op_type == "Range" and _is_16_bit(node.outputs[0]):
            dtype = node.outputs[0].dtype
            raise GraphNotRecognised(f"{described(node)}: Range in {dtype} is exact only up to {_exact_limit(dtype)}")
        if node in islands or not dependencies[node] or dependencies[node] <= SCALAR_INPUTS or not is_float(node):
            continue
        if node.op_type in NORM_OPS:
            raise GraphNotRecognised(f"{described(node)} is not part of a recognised RMSNorm chain")
        if node.op_type not in TRUNK_OPS:
            raise GraphNotRecognised(f"{described(node)} is not an op of a DiT's trunk")


def _exact_limit(dtype: ir.DataType | None) -> int:
    """Return the largest n for which a 16-bit float type represents every integer 0..n."""
    return 256 if dtype == ir.DataType.BFLOAT16 else 2048


def _is_16_bit(value: ir.Value) -> bool:
    return value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _leaves_fp32(node: ir.Node) -> bool:
    """Return True for a Cast from fp32 to fp16 or bf16; it ends an fp32 region and is excluded from it."""
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
    """Return x if the node computes x^2, else None."""
    if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
        return _origin(node.inputs[0])
    if node.op_type == "Pow" and _is_scalar(node.inputs[1], 2.0):
        return _origin(node.inputs[0])
    return None


def _norm_tail(mean: ir.Node, source: ir.Value) -> list[ir.Node] | None:
    """Return the nodes from the epsilon to the multiplication by gamma, or None if this mean is not an RMSNorm's."""
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


def _is_scalar(value: ir.Value | None, number: float) -> bool:
    array = query.constant_of(_origin(value))
    return array is not None and array.size == 1 and bool(np.isclose(float(array.reshape(())), number))
