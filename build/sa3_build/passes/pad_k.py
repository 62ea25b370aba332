"""Pad the K axis of linear layers to a multiple of 16: other sizes select a slow, unaligned kernel on every GPU."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.errors import described
from sa3_build.graph.rewrite import drop_unused_initializers, type_like
from sa3_build.passes.base import Pass, PassResult

MULTIPLE = 16


class PadK(Pass):
    """Add rows of zeros to every weight whose K is not a multiple of 16, and as many zeros to its activation.

    In a DiT that is the local embedding (K = 257). Its linear layers all read one activation, which is padded once.
    """

    name = "pad-k"

    def call(self, model: ir.Model) -> PassResult:
        padded: dict[ir.Value, ir.Value] = {}
        weights: dict[ir.Value, ir.Value] = {}
        notes: list[str] = []
        count = 0
        for node, weight in list(query.linear_nodes(model)):
            missing_rows = missing(node, weight)
            if not missing_rows:
                continue
            reason = _reason_to_leave(node, weight)
            if reason:
                notes.append(f"{described(node)}: {reason}")
                continue
            activation = node.inputs[0]
            assert activation is not None
            transposed = bool(node.attributes.get_int("transB", 0))
            if activation not in padded:
                padded[activation] = _pad(model, activation, missing_rows)
            if weight not in weights:
                weights[weight] = _taller(model, weight, missing_rows, transposed)
            node.replace_input_with(0, padded[activation])
            node.replace_input_with(1, weights[weight])
            count += 1
        if count:
            model.graph.sort()
            drop_unused_initializers(model)
        return PassResult(
            self.name, {"padded": count, "activations": len(padded), "not_matched": len(notes)}, tuple(notes)
        )


def missing(node: ir.Node, weight: ir.Value) -> int:
    """Return the number of rows that K lacks to a multiple of 16."""
    sizes = weight.const_value.shape.numpy() if weight.const_value is not None else ()
    transposed = node.inputs[1] is not weight or bool(node.attributes.get_int("transB", 0))
    return -sizes[-1 if transposed else 0] % MULTIPLE if len(sizes) == 2 else 0


def unaligned_linears(model: ir.Model) -> list[ir.Node]:
    """Return the linear layers that this pass would pad, once their weights are direct."""
    return [node for node, weight in query.linear_nodes(model)
            if missing(node, weight) and not node.attributes.get_int("transA", 0)]  # fmt: skip


def _reason_to_leave(node: ir.Node, weight: ir.Value) -> str | None:
    if node.attributes.get_int("transA", 0):
        return "its activation is transposed"
    if node.inputs[1] is not weight:
        return "its weight is not a direct initializer"
    activation = node.inputs[0]
    if activation is None or activation.shape is None:
        return "its activation has an unknown rank"
    return None


def _pad(model: ir.Model, activation: ir.Value, missing_rows: int) -> ir.Value:
    assert activation.shape is not None
    rank = len(activation.shape)
    name = f"{activation.name}_padded"
    pads = ir.val(
        f"{name}_by", const_value=ir.tensor(np.array([0] * (2 * rank - 1) + [missing_rows]), name=f"{name}_by")
    )
    model.graph.register_initializer(pads)
    node = ir.node("Pad", [activation, pads], name=name)
    result, last = node.outputs[0], activation.shape[-1]
    result.name = f"{name}_value"
    type_like(result, activation)
    result.shape = ir.Shape([*activation.shape[:-1], last + missing_rows if isinstance(last, int) else None])
    producer = activation.producer()
    if producer is None:
        model.graph.insert_before(model.graph[0], node)
    else:
        model.graph.insert_after(producer, node)
    return result


def _taller(model: ir.Model, weight: ir.Value, extra: int, transposed: bool) -> ir.Value:
    """Return the weight with more zeros along K, computed when it is written.

    No second copy of the weights stays in memory.
    """
    source = weight.const_value
    assert source is not None

    def padded() -> ir.TensorProtocol:
        more = ((0, 0), (0, extra)) if transposed else ((0, extra), (0, 0))
        return ir.tensor(np.pad(source.numpy(), more), name=name)

    name = f"{weight.name}_padded"
    rows, columns = source.shape.numpy()
    shape = ir.Shape([rows, columns + extra] if transposed else [rows + extra, columns])
    tensor = ir.LazyTensor(padded, dtype=source.dtype, shape=shape, name=name)
    value = ir.val(name, dtype=source.dtype, shape=shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value
