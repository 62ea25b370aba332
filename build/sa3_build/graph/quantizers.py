"""Find QuantizeLinear and DequantizeLinear pairs in a graph."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.graph import query


def dequantizers(product: ir.Node) -> tuple[ir.Node | None, ir.Node | None]:
    """The DequantizeLinear that feeds each side of a product, or None where there is none."""
    found = []
    for value in product.inputs[:2]:
        node = value.producer() if value is not None else None
        found.append(node if node is not None and node.op_type == "DequantizeLinear" else None)
    return found[0], found[1]


def quantized_source(dequantize: ir.Node) -> ir.Value | None:
    """What a Q/DQ pair quantises: the value in front of its QuantizeLinear."""
    stored = dequantize.inputs[0]
    quantize = stored.producer() if stored is not None else None
    return quantize.inputs[0] if quantize is not None else None


def stored_weight(product: ir.Node) -> ir.Value | None:
    """The weight behind a product, seen through a Q/DQ pair too; None when both sides are data."""
    if product.op_type not in query.PRODUCTS:
        return None
    pair = dequantizers(product)[1]
    if pair is None:
        return query.weight_of(product)
    value = quantized_source(pair) or pair.inputs[0]
    return value if value is not None and value.is_initializer() else None
