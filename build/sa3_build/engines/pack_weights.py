"""Queries of the packers: weights of linear layers, their scales, and neighbouring constants."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sa3_build.e4m3 import E4M3
from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_trt_core.number_formats import E4M3_MAX

BEFORE_WEIGHTS = ("Transpose", "Cast", "DequantizeLinear", "QuantizeLinear")
TILE = 16  # FP8 tensor cores require K to be a multiple of this


@dataclass(frozen=True)
class Weight:
    """Constant operand of a linear layer as stored, (K, N) for a MatMul, and its scale if it is quantised."""

    stored: ir.Value
    transposed: bool
    scale: np.ndarray | None

    def plain(self) -> np.ndarray:
        """Return the weight (N, K) without quantizers: E4M3 codes times their scales, one per output channel or one."""
        value = constant(self.stored)
        value = value.T if self.transposed else value
        if self.scale is not None and value.dtype == E4M3:
            value = value.astype(np.float32) * self.scale.astype(np.float32).reshape(-1, 1)
        return np.ascontiguousarray(value)

    def codes(self) -> np.ndarray:
        """Return E4M3 codes (N, K): the stored ones, or the nearest to the stored weight."""
        assert self.scale is not None
        value = constant(self.stored)
        value = value.T if self.transposed else value
        if value.dtype != E4M3:
            ratio = value.astype(np.float32) / self.scale.astype(np.float32).reshape(-1, 1)
            value = np.clip(ratio, -E4M3_MAX, E4M3_MAX).astype(E4M3)
        return np.ascontiguousarray(value)


def linear_weight(node: ir.Node) -> Weight | None:
    """Return the weight of a MatMul or Gemm, also through a quantizer; None when both sides are data."""
    if node.op_type not in query.GEMM_OPS:
        return None
    value, scale, transposed = (
        node.inputs[1],
        None,
        node.op_type == "MatMul" or not node.attributes.get_int("transB", 0),
    )
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in BEFORE_WEIGHTS:
            return None
        if producer.op_type == "DequantizeLinear":
            scale = constant(producer.inputs[1])
        if producer.op_type == "Transpose":
            transposed = not transposed
        value = producer.inputs[0]
    return None if value is None else Weight(value, transposed, scale)


def activation_scale(node: ir.Node) -> float | None:
    """Return the scale of the quantizer on a linear layer's data side, or None."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    while producer is not None and producer.op_type == "Cast":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    return float(constant(producer.inputs[1]).reshape(-1)[0])


def cores(linear: ir.Node) -> list[ir.Node]:
    """Return the attention GEMMs that read a linear layer's output on their left side (q)."""
    return [user for user, index in query.gemms_below(linear) if index == 0 and linear_weight(user) is None]


def only(candidates: list[ir.Node], what: str, near: ir.Node) -> ir.Node:
    """Return the first of one or two attention calls; both halves share norms and sources."""
    if len(candidates) not in (1, 2):
        raise GraphNotRecognised(f"no {what} {described(near)}")
    return candidates[0]


def one(candidates: set[ir.Node], what: str, near: ir.Node) -> ir.Node:
    """Return the single node of a set. Raises GraphNotRecognised for another number."""
    if len(candidates) != 1:
        raise GraphNotRecognised(
            f"{len(candidates)} nodes are candidates for the {what} {described(near)}, expected one"
        )
    return next(iter(candidates))


def constant(value: ir.Value | None) -> np.ndarray:
    """Return the constant that a value contains or repeats. Raises GraphNotRecognised without one."""
    array = broadcast_constant(value)
    if array is None:
        raise GraphNotRecognised(f"{value.name if value is not None else 'an input'} is not a constant")
    return array


def constants(node: ir.Node) -> list[np.ndarray]:
    """Return the constants that a node reads."""
    return [array for value in node.inputs if (array := query.constant_of(value)) is not None]


def broadcast_constant(value: ir.Value | None) -> np.ndarray | None:
    """Return the constant that a value repeats, skipping data movement; None without one."""
    while value is not None:
        array = query.constant_of(value)
        if array is not None:
            return array
        producer = value.producer()
        if producer is None or producer.op_type not in ("Expand", "Unsqueeze", "Cast", "Tile", "Reshape", "Identity"):
            return None
        value = producer.inputs[0]
    return None


def follows(node: ir.Node, op_type: str) -> bool:
    """Return True if an input of the node is computed by an op of this type."""
    producers: Iterable[ir.Node | None] = [value.producer() for value in node.inputs if value is not None]
    return any(producer is not None and producer.op_type == op_type for producer in producers)


def padded(weight: np.ndarray) -> np.ndarray:
    """Return a weight (N, K) with K zero-padded to a multiple of 16: other sizes select a slow kernel on every GPU."""
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % TILE)))
