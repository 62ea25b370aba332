"""Find the rows of an attention projection that compute q, k and v of each half, by running the graph.

Exporters split a projection differently: q|k|v|q2|k2 or q|q2|k|k2|v, by Slice, Split or Gather, halves apart or on a
separate axis. The rows of one head are changed together; the attention operand that changes depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sa3_build.engines.pack_weights import cores
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.partial_run import NotComputable, PartialRun
from sa3_trt_core.torch_models.dit.weights import HEAD_CHANNELS

FRAMES = 16
MIN_CHANGE = 1e-3  # relative to the largest entry; dependent entries change far more, others not at all


@dataclass(frozen=True)
class Calls:
    """Attention calls that read a projection: q and k of both halves, in order, and v."""

    q: tuple[ir.Value, ...]
    k: tuple[ir.Value, ...]  # transposed
    v: ir.Value


def attention_calls(linear: ir.Node) -> Calls:
    """Return the one or two attention calls that read a projection's q; the subtracted one is last."""
    matmuls = cores(linear)
    if len(matmuls) not in (1, 2):
        raise GraphNotRecognised(f"{len(matmuls)} attention calls after {described(linear)}, expected one or two")
    seconds = [_second_linear(core) for core in matmuls]
    if len(matmuls) == 2 and _subtracted(seconds[0], seconds[1]):
        matmuls.reverse()
        seconds.reverse()
    sides = [(core.inputs[0], core.inputs[1], second.inputs[1]) for core, second in zip(matmuls, seconds, strict=True)]
    queries, keys, values = zip(*[[_value(side) for side in call] for call in sides], strict=True)
    return Calls(tuple(queries), tuple(keys), values[0])


def rows_of(run: PartialRun, linear: ir.Node, operands: Sequence[ir.Value], tokens: int) -> np.ndarray:
    """Return the rows (N,) of a projection in the order of the heads of `operands`, concatenated.

    `tokens` is the number of rows of the layer's data. Raises GraphNotRecognised when an operand's head does not depend
    on exactly one head of the projection.
    """
    result = linear.outputs[0]
    shape = run.shapes.shape(result)
    width = shape[-1].number if shape and shape[-1] is not None else None
    if width is None or width % HEAD_CHANNELS or result.dtype is None:
        raise GraphNotRecognised(f"{described(linear)} is not split into heads of {HEAD_CHANNELS} channels")
    groups = width // HEAD_CHANNELS
    bits = groups.bit_length()
    rng = np.random.default_rng(0)
    base = rng.standard_normal((1, tokens, groups, HEAD_CHANNELS))
    # Token b of the second run has new values in every head whose 1-based index has bit b set.
    marked = (np.arange(1, groups + 1)[None, :] >> np.arange(tokens)[:, None].clip(max=62)) & 1
    changed = np.where(marked[None, :, :, None], rng.standard_normal(base.shape), base)
    sides = []
    for data in (base, changed):
        array = data.reshape(1, tokens, width).astype(result.dtype.numpy())
        try:
            sides.append(run.run(operands, {result: array}, FRAMES))
        except NotComputable as reason:
            raise GraphNotRecognised(f"attention inputs of {described(linear)} cannot be computed: {reason}") from None
    order: list[int] = []
    for index, operand in enumerate(operands):
        before, after = (_by_head(side[index], tokens) for side in sides)
        moved = np.abs(before.astype(np.float64) - after).max(axis=-1) > MIN_CHANGE * np.abs(before).max()
        # v occurs twice if one call computes both halves.
        order += dict.fromkeys(_decoded(row[:bits], groups, operand, linear) for row in moved)
    if sorted(order) != list(range(groups)):
        raise GraphNotRecognised(f"attention does not read every row of {described(linear)} exactly once")
    return (np.array(order)[:, None] * HEAD_CHANNELS + np.arange(HEAD_CHANNELS)).reshape(-1)


def tokens_of(run: PartialRun, linear: ir.Node) -> int:
    """Return the number of tokens that a projection of the latent has in a run: FRAMES plus memory tokens."""
    shape = run.shapes.shape(linear.outputs[0])
    length = shape[-2] if shape is not None and len(shape) == 3 else None
    number = length.at("L", FRAMES).number if length is not None else None
    if number is None:
        raise GraphNotRecognised(f"{described(linear)} has no axis of L plus memory tokens")
    return number


def _decoded(bits: np.ndarray, groups: int, operand: ir.Value, linear: ir.Node) -> int:
    number = int((bits.astype(np.int64) << np.arange(len(bits))).sum())
    if not 1 <= number <= groups:
        raise GraphNotRecognised(f"{operand.name} does not consist of heads of {described(linear)}")
    return number - 1


def _by_head(array: np.ndarray, tokens: int) -> np.ndarray:
    """Return an operand as (heads, tokens, channels); k has its last two axes transposed."""
    if array.shape[-2] != tokens:
        array = np.swapaxes(array, -1, -2)
    return array.reshape(-1, tokens, array.shape[-1])


def _second_linear(core: ir.Node) -> ir.Node:
    """Return the MatMul with v that reads the softmax of this MatMul's scores."""
    node = core
    for _ in range(8):  # a scale, a Cast, the Softmax
        users = [use for use in node.outputs[0].uses()]
        if len(users) != 1:
            break
        if users[0].node.op_type == "MatMul" and users[0].idx == 0:
            return users[0].node
        node = users[0].node
    raise GraphNotRecognised(f"no MatMul with v after {described(core)}")


def _subtracted(first: ir.Node, second: ir.Node) -> bool:
    """Return True if the first call is subtracted from the second."""
    node = first
    for _ in range(8):
        users = [use for use in node.outputs[0].uses()]
        if len(users) != 1:
            break
        if users[0].node.op_type == "Sub":
            return bool(users[0].idx == 1)
        node = users[0].node
    raise GraphNotRecognised(f"no difference of two attention calls after {described(second)}")


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
