"""Find which rows of an attention projection make q, k and v of either half: by running the graph, not by its layout.

Exporters differ in how they cut a projection: q|k|v|q2|k2 or q|q2|k|k2|v, by Slice, Split or Gather, halves apart or on
an axis of their own. Rows of one head are changed together, and whatever attention operand moves was made of them.
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
MOVED = 1e-3  # of the largest entry; what depends on a row moves by far more, what does not by nothing


@dataclass(frozen=True)
class Calls:
    """The attention calls behind a projection of queries: q and k of both halves, in order, and v."""

    q: tuple[ir.Value, ...]
    k: tuple[ir.Value, ...]  # transposed
    v: ir.Value


def calls_behind(product: ir.Node) -> Calls:
    """Return the one or two attention calls that read a projection's q, the one that is subtracted last."""
    found = cores(product)
    if len(found) not in (1, 2):
        raise GraphNotRecognised(f"{len(found)} attention calls behind {described(product)}, not one or two")
    seconds = [_second_product(core) for core in found]
    if len(found) == 2 and _subtracted(seconds[0], seconds[1]):
        found.reverse()
        seconds.reverse()
    sides = [(core.inputs[0], core.inputs[1], second.inputs[1]) for core, second in zip(found, seconds, strict=True)]
    queries, keys, values = zip(*[[_value(side) for side in one] for one in sides], strict=True)
    return Calls(tuple(queries), tuple(keys), values[0])


def rows_of(run: PartialRun, product: ir.Node, operands: Sequence[ir.Value], tokens: int) -> np.ndarray:
    """Return the rows (N,) of a projection in the order in which its heads stand in `operands`, one after another.

    `tokens` is the number of rows of the product's data. Raises GraphNotRecognised when an operand's head is not made
    of one head of the projection.
    """
    result = product.outputs[0]
    shape = run.shapes.shape(result)
    width = shape[-1].number if shape and shape[-1] is not None else None
    if width is None or width % HEAD_CHANNELS or result.dtype is None:
        raise GraphNotRecognised(f"{described(product)} is not cut into heads of {HEAD_CHANNELS} channels")
    groups = width // HEAD_CHANNELS
    bits = groups.bit_length()
    rng = np.random.default_rng(0)
    base = rng.standard_normal((1, tokens, groups, HEAD_CHANNELS))
    # Token b of the second run has new numbers in every head whose count, from 1, holds bit b.
    marked = (np.arange(1, groups + 1)[None, :] >> np.arange(tokens)[:, None].clip(max=62)) & 1
    other = np.where(marked[None, :, :, None], rng.standard_normal(base.shape), base)
    sides = []
    for given in (base, other):
        array = given.reshape(1, tokens, width).astype(result.dtype.numpy())
        try:
            sides.append(run.run(operands, {result: array}, FRAMES))
        except NotComputable as why:
            raise GraphNotRecognised(f"what {described(product)} gives to attention is not known: {why}") from None
    order: list[int] = []
    for place, operand in enumerate(operands):
        before, after = (_by_head(side[place], tokens) for side in sides)
        apart = np.abs(before.astype(np.float64) - after).max(axis=-1) > MOVED * np.abs(before).max()
        # v stands twice where one call serves both halves.
        order += dict.fromkeys(_decoded(row[:bits], groups, operand, product) for row in apart)
    if sorted(order) != list(range(groups)):
        raise GraphNotRecognised(f"attention does not read every row of {described(product)} once")
    return (np.array(order)[:, None] * HEAD_CHANNELS + np.arange(HEAD_CHANNELS)).reshape(-1)


def tokens_of(run: PartialRun, product: ir.Node) -> int:
    """How many tokens a projection of the latent sees in a run of FRAMES frames: those, and the memory tokens."""
    shape = run.shapes.shape(product.outputs[0])
    length = shape[-2] if shape is not None and len(shape) == 3 else None
    number = length.at("L", FRAMES).number if length is not None else None
    if number is None:
        raise GraphNotRecognised(f"{described(product)} gives no axis of L and some memory tokens")
    return number


def _decoded(bits: np.ndarray, groups: int, operand: ir.Value, product: ir.Node) -> int:
    number = int((bits.astype(np.int64) << np.arange(len(bits))).sum())
    if not 1 <= number <= groups:
        raise GraphNotRecognised(f"{operand.name} is not made of heads of {described(product)}")
    return number - 1


def _by_head(array: np.ndarray, tokens: int) -> np.ndarray:
    """Return an operand as (heads, tokens, channels); k comes with its last two axes the other way round."""
    if array.shape[-2] != tokens:
        array = np.swapaxes(array, -1, -2)
    return array.reshape(-1, tokens, array.shape[-1])


def _second_product(core: ir.Node) -> ir.Node:
    """Return the product with v that reads what a Softmax makes of this one."""
    node = core
    for _ in range(8):  # a scale, a Cast, the Softmax
        users = [use for use in node.outputs[0].uses()]
        if len(users) != 1:
            break
        if users[0].node.op_type == "MatMul" and users[0].idx == 0:
            return users[0].node
        node = users[0].node
    raise GraphNotRecognised(f"no product with v was found behind {described(core)}")


def _subtracted(first: ir.Node, second: ir.Node) -> bool:
    """Is it the first call that is subtracted from the second?"""
    node = first
    for _ in range(8):
        users = [use for use in node.outputs[0].uses()]
        if len(users) != 1:
            break
        if users[0].node.op_type == "Sub":
            return bool(users[0].idx == 1)
        node = users[0].node
    raise GraphNotRecognised(f"no difference of two attention calls behind {described(second)}")


def _value(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value
