"""Adaptable layers of a DiT graph, identified by what each computes, with their weights in native row order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sa3_build.engines import row_order
from sa3_build.engines.pack_weights import Weight, cores, linear_weight, one, only
from sa3_build.graph import io as graph_io, query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.partial_run import PartialRun
from sa3_build.passes import canonicalize
from sa3_trt_core.lora.layers import NATIVE_ORDER, QKV_PARTS, layer_of_role
from sa3_trt_core.shapes import LOCAL_CHANNELS, TEXT_TOKENS

STREAM = ("self_qkv", "self_out", "cross_q", "cross_out", "ff_in", "ff_out")  # layers that depend on x, in order
FRONT = (
    (frozenset({"t"}), ("time.0", "time.2")),
    (frozenset({"seconds_total"}), ("seconds", "global.0", "global.2")),
    (frozenset({"t", "seconds_total"}), ("modulation.0", "modulation.2")),
)


@dataclass(frozen=True)
class GraphLayer:
    """One layer: its role in a packed DiT, its node, its weight, and the row order of the graph."""

    role: str
    node: ir.Node
    weight: Weight
    rows: np.ndarray | None  # the graph's row of each native row; None where they are the same
    columns: int  # of the native weight; a graph may have padded it

    @property
    def name(self) -> str:
        """The native name."""
        return layer_of_role(self.role)

    def native(self) -> np.ndarray:
        """Return the weight (out, in) fp32 in native rows, without padding."""
        if self.weight.scale is None:
            plain = self.weight.plain()
        else:
            plain = self.weight.codes().astype(np.float32) * self.weight.scale.astype(np.float32).reshape(-1, 1)
        plain = plain.reshape(plain.shape[0], -1).astype(np.float32)[:, : self.columns]
        return self.native_rows(plain)

    def native_rows(self, graph_rows: np.ndarray) -> np.ndarray:
        """Return rows (N, ...) of the graph in native order."""
        return graph_rows if self.rows is None else graph_rows[self.rows]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the native weight, derived from the stored shape."""
        assert self.weight.stored.const_value is not None
        sizes = [int(size) for size in self.weight.stored.const_value.shape.numpy()]
        return (sizes[1] if self.weight.transposed else sizes[0]), self.columns

    def graph_rows(self, native: np.ndarray) -> np.ndarray:
        """Return a native weight (out, in) as (N, K) in the graph's row order, padded like the graph's."""
        rows = native
        if self.rows is not None:
            rows = np.empty_like(native)
            rows[self.rows] = native
        extra = _inputs_of(self.weight) - rows.shape[1]
        return np.pad(rows, ((0, 0), (0, extra))) if extra else rows


def find_layers(path: Path) -> tuple[ir.Model, dict[str, GraphLayer]]:
    """Return a DiT graph and its layers by native name. Raises GraphNotRecognised naming what is missing."""
    model = graph_io.load(path)
    model.graph.sort()
    nodes = _LayerFinder(model).nodes()
    orders = _row_orders(path)
    layers = {}
    stored: dict[ir.Value, str] = {}
    for role, node in nodes.items():
        weight = _weight(node)
        if weight.stored in stored:
            raise GraphNotRecognised(f"{described(node)} shares its weight with the {stored[weight.stored]} layer")
        stored[weight.stored] = role
        columns = LOCAL_CHANNELS if role.endswith("local_in") else _inputs_of(weight)
        layers[layer_of_role(role)] = GraphLayer(role, node, weight, orders.get(role), columns)
    return model, layers


def _row_orders(path: Path) -> dict[str, np.ndarray]:
    """Return by role the graph's row of each native row, for attention projections in another order than native.

    The native order is q | k | v | q2 | k2, q | q2 and k | k2 | v; without a second half q | k | v, q and k | v. Raises
    GraphNotRecognised.
    """
    model = graph_io.load(path)
    canonicalize.canonicalize(model, free_batch=False)  # sizes are known only after this; no pass moves rows
    nodes, run = _LayerFinder(model).nodes(), PartialRun(model)
    orders: dict[str, np.ndarray] = {}
    for index in range(sum(role.endswith(".self_qkv") for role in nodes)):
        block = f"blocks.{index}."
        own, cross = (row_order.attention_calls(nodes[block + name]) for name in ("self_qkv", "cross_q"))
        tokens = row_order.tokens_of(run, nodes[f"{block}self_qkv"])
        for name, operands, seen in (
            ("self_qkv", (*own.q, *own.k, own.v), tokens),
            ("cross_q", cross.q, tokens),
            ("cross_kv", (*cross.k, cross.v), TEXT_TOKENS + 1),
        ):
            rows = row_order.rows_of(run, nodes[block + name], operands, seen)
            if name == "self_qkv" and _is_differential(nodes[block + name]):
                rows = _reordered(rows, NATIVE_ORDER)
            if (rows != np.arange(len(rows))).any():
                orders[block + name] = rows
    return orders


class _LayerFinder:
    """Finder of the node of every role: the residual stream's layers have a fixed order, the others feed them."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._depends_on = query.input_dependencies(model)
        self._weighted = [node for node in model.graph if linear_weight(node) is not None]

    def nodes(self) -> dict[str, ir.Node]:
        """Return role -> node. Raises GraphNotRecognised."""
        stream = [node for node in self._weighted if "x" in self._depends_on[node]]
        depth, remainder = divmod(len(stream) - 2, len(STREAM))
        if depth < 1 or remainder:
            raise GraphNotRecognised(f"{len(stream)} linears depend on x, expected 2 + {len(STREAM)} per block")
        nodes_by_role = {"input": stream[0], "output": stream[-1], **self._convolutions(), **self._front()}
        for index in range(depth):
            part = stream[1 + index * len(STREAM) : 1 + (index + 1) * len(STREAM)]
            nodes_by_role |= {f"blocks.{index}.{name}": node for name, node in zip(STREAM, part, strict=True)}
        self._text_and_local(nodes_by_role, depth)
        return nodes_by_role

    def _convolutions(self) -> dict[str, ir.Node]:
        nodes = [node for node in self._model.graph if node.op_type == "Conv"]
        if len(nodes) != 2:
            raise GraphNotRecognised(f"{len(nodes)} convolutions, expected one at each end")
        return dict(zip(("preprocess", "postprocess"), nodes, strict=True))

    def _front(self) -> dict[str, ir.Node]:
        nodes_by_role: dict[str, ir.Node] = {}
        for inputs, names in FRONT:
            nodes = [node for node in self._weighted if self._depends_on[node] == inputs]
            if len(nodes) != len(names):
                raise GraphNotRecognised(f"{len(nodes)} linears depend on {' and '.join(sorted(inputs))} only")
            nodes_by_role |= dict(zip(names, nodes, strict=True))
        return nodes_by_role

    def _text_and_local(self, nodes_by_role: dict[str, ir.Node], depth: int) -> None:
        """Add the text's two layers, and each block's cross_kv, local_in and local_out."""
        text = [
            node
            for node in self._weighted
            if {"t5_hidden"} <= self._depends_on[node] and "x" not in self._depends_on[node]
        ]
        if len(text) != depth + 2:
            raise GraphNotRecognised(f"{len(text)} linears depend on the text only, expected 2 + one per block")
        nodes_by_role |= {"context_in": text[0], "context_out": text[1]}
        local = {node for node in self._weighted if self._depends_on[node] == {"local_add_cond"}}
        seen: set[ir.Node] = set()
        for index in range(depth):
            block = f"blocks.{index}."
            cross, into = nodes_by_role[f"{block}cross_q"], nodes_by_role[f"{block}ff_in"]
            keys = self._upstream(only(cores(cross), "attention of", cross).inputs[1])
            nodes_by_role[f"{block}cross_kv"] = one(keys & set(text[2:]), "cross-attention keys", cross)
            added = (self._upstream(into.inputs[0]) & local) - seen
            nodes_by_role[f"{block}local_out"] = out = one(added, "local embedding before", into)
            seen |= added
            nodes_by_role[f"{block}local_in"] = one(
                self._upstream(out.inputs[0]) & local, "first local linear before", out
            )

    def _upstream(self, value: ir.Value | None) -> set[ir.Node]:
        return query.ancestors([value], stop=lambda node: node.op_type in query.GEMM_OPS or query.gives_sizes(node))


def _weight(node: ir.Node) -> Weight:
    if node.op_type != "Conv":
        weight = linear_weight(node)
        assert weight is not None
        return weight
    value = node.inputs[1]
    while value is not None and not value.is_initializer():
        producer = value.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type in ("Cast", "Identity") else None
    if value is None:
        raise GraphNotRecognised(f"{described(node)} has no stored weight")
    return Weight(value, False, None)


def in_stored_layout(layer: GraphLayer, rows: np.ndarray) -> np.ndarray:
    """Return `rows` (N, K) in the shape of the layer's stored tensor: transposed, or with a convolution's last axis."""
    assert layer.weight.stored.const_value is not None
    transposed = rows.T if layer.weight.transposed else rows
    return np.ascontiguousarray(transposed).reshape(layer.weight.stored.const_value.shape.numpy())


def _inputs_of(weight: Weight) -> int:
    """Return K of a weight as stored."""
    shape = weight.stored.const_value.shape.numpy() if weight.stored.const_value is not None else (0, 0)
    return int(shape[0] if weight.transposed else shape[1])


def _is_differential(qkv: ir.Node) -> bool:
    weight = _weight(qkv)
    assert weight.stored.const_value is not None
    sizes = [int(size) for size in weight.stored.const_value.shape.numpy()]
    return max(sizes) == QKV_PARTS * min(sizes)


def _reordered(rows: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    parts = np.split(rows, QKV_PARTS)
    return np.concatenate([parts[index] for index in order])
