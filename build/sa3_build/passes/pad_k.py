"""Pad the inner size of a product to a multiple of 16: an odd one takes a slow, unaligned kernel on every GPU."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.errors import described
from sa3_build.graph.rewrite import drop_unused_initializers, type_like
from sa3_build.passes.base import Pass, PassResult

MULTIPLE = 16


class PadK(Pass):
    """Give every weighted product whose K is no multiple of 16 rows of zeros, and its activation as many zeros.

    In a DiT that is the local embedding (K = 257), whose products all read one activation: it is padded once.
    """

    name = "pad-k"

    def call(self, model: ir.Model) -> PassResult:
        padded: dict[ir.Value, ir.Value] = {}
        weights: dict[ir.Value, ir.Value] = {}
        notes: list[str] = []
        done = 0
        for node, weight in list(query.weighted_products(model)):
            extra = missing(node, weight)
            if not extra:
                continue
            why = _reason_to_leave(node, weight)
            if why:
                notes.append(f"{described(node)}: {why}")
                continue
            activation = node.inputs[0]
            assert activation is not None
            across = bool(node.attributes.get_int("transB", 0))
            if activation not in padded:
                padded[activation] = _pad(model, activation, extra)
            if weight not in weights:
                weights[weight] = _taller(model, weight, extra, across)
            node.replace_input_with(0, padded[activation])
            node.replace_input_with(1, weights[weight])
            done += 1
        if done:
            model.graph.sort()
            drop_unused_initializers(model)
        return PassResult(self.name, {"padded": done, "activations": len(padded), "left": len(notes)}, tuple(notes))


def missing(node: ir.Node, weight: ir.Value) -> int:
    """How many rows K lacks to a multiple of 16."""
    sizes = weight.const_value.shape.numpy() if weight.const_value is not None else ()
    behind_transpose = node.inputs[1] is not weight or bool(node.attributes.get_int("transB", 0))
    return -sizes[-1 if behind_transpose else 0] % MULTIPLE if len(sizes) == 2 else 0


def odd_products(model: ir.Model) -> list[ir.Node]:
    """The products that this pass would pad, once their weights are direct."""
    return [node for node, weight in query.weighted_products(model)
            if missing(node, weight) and not node.attributes.get_int("transA", 0)]  # fmt: skip


def _reason_to_leave(node: ir.Node, weight: ir.Value) -> str | None:
    if node.attributes.get_int("transA", 0):
        return "its activation is turned"
    if node.inputs[1] is not weight:
        return "its weight is not direct"
    activation = node.inputs[0]
    if activation is None or activation.shape is None:
        return "the number of axes of its activation is not known"
    return None


def _pad(model: ir.Model, activation: ir.Value, extra: int) -> ir.Value:
    assert activation.shape is not None
    rank = len(activation.shape)
    name = f"{activation.name}_padded"
    pads = ir.val(f"{name}_by", const_value=ir.tensor(np.array([0] * (2 * rank - 1) + [extra]), name=f"{name}_by"))
    model.graph.register_initializer(pads)
    node = ir.node("Pad", [activation, pads], name=name)
    result, last = node.outputs[0], activation.shape[-1]
    result.name = f"{name}_value"
    type_like(result, activation)
    result.shape = ir.Shape([*activation.shape[:-1], last + extra if isinstance(last, int) else None])
    producer = activation.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    return result


def _taller(model: ir.Model, weight: ir.Value, extra: int, across: bool) -> ir.Value:
    """The weight with more zeros along K, made when it is written, so that no second copy lies in memory."""
    source = weight.const_value
    assert source is not None

    def made() -> ir.TensorProtocol:
        more = ((0, 0), (0, extra)) if across else ((0, extra), (0, 0))
        return ir.tensor(np.pad(source.numpy(), more), name=name)

    name = f"{weight.name}_padded"
    rows, columns = source.shape.numpy()
    shape = ir.Shape([rows, columns + extra] if across else [rows + extra, columns])
    tensor = ir.LazyTensor(made, dtype=source.dtype, shape=shape, name=name)
    value = ir.val(name, dtype=source.dtype, shape=shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value
