"""Add guidance's null row to a DiT graph: cross tokens of a row without text and mask are zero."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.partial_run import NotComputable, PartialRun
from sa3_build.graph.rewrite import replace_uses, type_like
from sa3_build.passes.base import Pass, PassResult
from sa3_trt_core.shapes import CONTRACTS, TEXT_CHANNELS, TEXT_TOKENS

FEW_FRAMES = 4
SECONDS = 47.0  # 47 / 384 is inexact in 16 bits, and its duration token is not zero


class AddNullRow(Pass):
    """Multiply the cross tokens of a row by 0 if its t5_hidden and t5_mask are all zero, else by 1.

    In the model's own unconditional branch all cross tokens are zero, including the duration's. In the published
    contract zero text becomes padding embeddings beside the duration token, and no input reaches that branch. A graph
    that already computes zero tokens for such a row is not changed, nor is one whose cross tokens are not recognised.
    """

    name = "null-row"

    def call(self, model: ir.Model) -> PassResult:
        tokens = cross_tokens(model)
        if tokens is None:
            return PassResult(self.name, {"added": 0}, ("no linear layer reads the cross tokens",))
        if has_null_row(model):
            return PassResult(self.name, {"added": 0})
        chain = _conditioned(model)
        scaled = ir.node("Mul", [tokens, chain[-1].outputs[0]], name="null_row_tokens")
        type_like(scaled.outputs[0], tokens)
        scaled.outputs[0].shape, scaled.outputs[0].name = tokens.shape, "null_row_tokens_value"
        producer = tokens.producer()
        assert producer is not None
        replace_uses(tokens, scaled.outputs[0])
        scaled.replace_input_with(0, tokens)
        model.graph.insert_after(producer, [*chain, scaled])
        return PassResult(self.name, {"added": 1})


def cross_tokens(model: ir.Model) -> ir.Value | None:
    """Return the cross tokens (B, 257, 768): the input of the first linear layer that depends on text and not on x.

    Returns None without such a layer.
    """
    dependencies = query.input_dependencies(model)
    for node in model.graph:
        if node.op_type not in query.GEMM_OPS or "t5_hidden" not in dependencies[node] or "x" in dependencies[node]:
            continue
        weight_node = node.inputs[1].producer() if node.inputs[1] is not None else None
        if weight_node is None or not dependencies[weight_node]:  # a weight, quantised or not
            value = node.inputs[0]
            while (
                value is not None and (producer := value.producer()) is not None and producer.op_type in _SEEN_THROUGH
            ):
                value = producer.inputs[0]
            return value if value is not None and value.producer() is not None else None
    return None


def has_null_row(model: ir.Model) -> bool:
    """Return True when a row without text and mask has zero cross tokens, and one with a mask alone does not."""
    tokens = cross_tokens(model)
    if tokens is None:
        return False
    try:
        run = PartialRun(model)
        null, text = (run.run([tokens], _feeds(model, mask), FEW_FRAMES)[0] for mask in (0.0, 1.0))
    except NotComputable:
        return False
    return not null.any() and bool(text.any())


def _feeds(model: ir.Model, mask: float) -> dict[ir.Value, np.ndarray]:
    """Return the inputs of one row without text, with a constant mask."""
    values = {str(value.name): value for value in model.graph.inputs}
    sizes = {spec.name: tuple(dim if isinstance(dim, int) else FEW_FRAMES if dim == "L" else 1 for dim in spec.dims)
             for spec in CONTRACTS["dit"].inputs}  # fmt: skip
    feeds = {values[name]: np.zeros(size, np.float32) for name, size in sizes.items() if name in values}
    feeds[values["t5_mask"]][:] = mask
    feeds[values["seconds_total"]][:] = SECONDS
    return feeds


def _conditioned(model: ir.Model) -> list[ir.Node]:
    """Return nodes that compute max |t5_hidden| + max |t5_mask| > 0 per row, as 0 or 1 (B, 1, 1)."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    hidden, mask = inputs["t5_hidden"], inputs["t5_mask"]
    assert hidden.shape is not None
    both, last = (_constant(model, f"null_row_axes_{len(axes)}", np.array(axes)) for axes in ([1, 2], [1]))
    zero = _constant(model, "null_row_zero", np.array(0, np.float32))
    text_abs = ir.node("Abs", [hidden])
    text_amax = ir.node("ReduceMax", [text_abs.outputs[0], both], {"keepdims": 1})
    mask_abs = ir.node("Abs", [mask])
    mask_amax = ir.node("ReduceMax", [mask_abs.outputs[0], last], {"keepdims": 1})
    column = ir.node("Unsqueeze", [mask_amax.outputs[0], last])
    total = ir.node("Add", [text_amax.outputs[0], column.outputs[0]])
    positive = ir.node("Greater", [total.outputs[0], zero])
    conditioned = ir.node("Cast", [positive.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    chain = [text_abs, text_amax, mask_abs, mask_amax, column, total, positive, conditioned]
    shapes: tuple[tuple[int | str, ...], ...] = (
        ("B", TEXT_TOKENS, TEXT_CHANNELS), ("B", 1, 1), ("B", TEXT_TOKENS), ("B", 1), *[("B", 1, 1)] * 4
    )  # fmt: skip
    for node, shape in zip(chain, shapes, strict=True):
        node.name = f"null_row_{node.op_type}_{chain.index(node)}"
        value = node.outputs[0]
        value.name, value.dtype = f"{node.name}_value", ir.DataType.BOOL if node is positive else ir.DataType.FLOAT
        value.shape = ir.Shape([hidden.shape[0] if axis == "B" else axis for axis in shape])
    return chain


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


_SEEN_THROUGH = ("Cast", "QuantizeLinear", "DequantizeLinear")
