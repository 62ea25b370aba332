"""What a packer asks of a graph: the weight behind a product, its scales, and what lies around it."""

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
TILE = 16  # FP8 tensor cores want multiples of it


@dataclass(frozen=True)
class Weight:
    """A product's constant side as stored: (K, N) of a MatMul, and its scales if it is quantised."""

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
        """E4M3 codes (N, K): the stored ones, or the nearest of the stored weight."""
        assert self.scale is not None
        value = constant(self.stored)
        value = value.T if self.transposed else value
        if value.dtype != E4M3:
            ratio = value.astype(np.float32) / self.scale.astype(np.float32).reshape(-1, 1)
            value = np.clip(ratio, -E4M3_MAX, E4M3_MAX).astype(E4M3)
        return np.ascontiguousarray(value)


def weight_of(node: ir.Node) -> Weight | None:
    if node.op_type not in query.GEMM_OPS:
        return None
    value, scale, turned = node.inputs[1], None, node.op_type == "MatMul" or not node.attributes.get_int("transB", 0)
    while value is not None and not value.is_initializer():
        maker = value.producer()
        if maker is None or maker.op_type not in BEFORE_WEIGHTS:
            return None
        if maker.op_type == "DequantizeLinear":
            scale = constant(maker.inputs[1])
        if maker.op_type == "Transpose":
            turned = not turned
        value = maker.inputs[0]
    return None if value is None else Weight(value, turned, scale)


def activation_scale(node: ir.Node) -> float | None:
    """Return the scale of the quantizer on a product's data side, None without one."""
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    while maker is not None and maker.op_type == "Cast":
        maker = maker.inputs[0].producer() if maker.inputs[0] is not None else None
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    return float(constant(maker.inputs[1]).reshape(-1)[0])


def cores(product: ir.Node) -> list[ir.Node]:
    """Return the first attention products below a product: those that read its q on their left side."""
    return [user for user, index in query.gemms_below(product) if index == 0 and weight_of(user) is None]


def only(found: list[ir.Node], what: str, near: ir.Node) -> ir.Node:
    """Return the first of one or two halves, which share norms and sources."""
    if len(found) not in (1, 2):
        raise GraphNotRecognised(f"no {what} {described(near)}")
    return found[0]


def one(found: set[ir.Node], what: str, near: ir.Node) -> ir.Node:
    if len(found) != 1:
        raise GraphNotRecognised(f"{len(found)} nodes are the {what} {described(near)}")
    return next(iter(found))


def constant(value: ir.Value | None) -> np.ndarray:
    found = constant_behind(value)
    if found is None:
        raise GraphNotRecognised(f"{value.name if value is not None else 'an input'} is no constant")
    return found


def constants(node: ir.Node) -> list[np.ndarray]:
    return [found for value in node.inputs if (found := query.constant_of(value)) is not None]


def constant_behind(value: ir.Value | None) -> np.ndarray | None:
    """Return the constant that a value repeats, seen through what only moves it."""
    while value is not None:
        found = query.constant_of(value)
        if found is not None:
            return found
        maker = value.producer()
        if maker is None or maker.op_type not in ("Expand", "Unsqueeze", "Cast", "Tile", "Reshape", "Identity"):
            return None
        value = maker.inputs[0]
    return None


def follows(node: ir.Node, op_type: str) -> bool:
    makers: Iterable[ir.Node | None] = [value.producer() for value in node.inputs if value is not None]
    return any(maker is not None and maker.op_type == op_type for maker in makers)


def padded(weight: np.ndarray) -> np.ndarray:
    """K to a multiple of 16 with zeros: an odd K is a slow kernel on every GPU."""
    return np.pad(weight, ((0, 0), (0, -weight.shape[1] % TILE)))
