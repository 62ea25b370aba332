"""Find QuantizeLinear and DequantizeLinear pairs in a graph."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.graph import query


def dequantizers(linear: ir.Node) -> tuple[ir.Node | None, ir.Node | None]:
    """Return the DequantizeLinear that feeds each side of a MatMul or Gemm; None for a side without one."""
    pair = []
    for value in linear.inputs[:2]:
        node = value.producer() if value is not None else None
        pair.append(node if node is not None and node.op_type == "DequantizeLinear" else None)
    return pair[0], pair[1]


def quantized_source(dequantize: ir.Node) -> ir.Value | None:
    """Return the value that a Q/DQ pair quantises: the input of its QuantizeLinear."""
    stored = dequantize.inputs[0]
    quantize = stored.producer() if stored is not None else None
    return quantize.inputs[0] if quantize is not None else None


def stored_weight(linear: ir.Node) -> ir.Value | None:
    """Return the weight initializer of a MatMul or Gemm, also through Q/DQ; None when both sides are data."""
    if linear.op_type not in query.GEMM_OPS:
        return None
    pair = dequantizers(linear)[1]
    if pair is None:
        return query.weight_initializer(linear)
    value = quantized_source(pair) or pair.inputs[0]
    return value if value is not None and value.is_initializer() else None
