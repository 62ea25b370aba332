"""Role and layer of each quantised linear layer of a DiT, derived from the graph, which has no module names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.fp32_islands import LATENT
from sa3_build.quantization.selection import Selection

KINDS = (
    "text in",
    "text out",
    "self-attention qkv",
    "self-attention out",
    "cross-attention q",
    "cross-attention kv",
    "cross-attention out",
    "feed-forward in",
    "feed-forward out",
)


@dataclass(frozen=True)
class LayerRole:
    """Role of a linear layer, and the index of its transformer layer; None outside the layers."""

    kind: str
    layer: int | None


def roles_of(model: ir.Model, selection: Selection) -> dict[str, LayerRole]:
    """Return the role of every quantised linear layer, by node name, in a sorted graph.

    The role follows from the nearest MatMul and Gemm nodes upstream and downstream. q, k and v feed the attention core;
    the attention's output layer reads it. Attention is cross-attention if an operand of its core does not depend on the
    latent. The other layers that do not depend on the latent are the text path. The second layer of a feed-forward has
    one GEMM upstream, the first; all others read the residual stream, which has several GEMMs upstream.
    """
    nodes = {str(node.name): node for node in model.graph}
    linears = [nodes[linear.node] for linear in selection.quantized]
    finder = _RoleFinder(model, frozenset(linears))
    kinds = {node: finder.kind(node) for node in linears}
    ends = {node for node, kind in kinds.items() if kind == "feed-forward out"}
    roles = {}
    for node, kind in kinds.items():
        inside = kind.startswith(("self", "cross", "feed"))
        readers = finder.cores_below(node) or [node]
        layer = len(query.ancestors(value for reader in readers for value in reader.inputs) & ends)
        roles[str(node.name)] = LayerRole(kind, layer if inside else None)
    return roles


class _RoleFinder:
    """Relations between the GEMM nodes of one graph."""

    def __init__(self, model: ir.Model, quantised: frozenset[ir.Node]) -> None:
        self._dependencies = query.input_dependencies(model)
        self._quantised = quantised

    def kind(self, node: ir.Node) -> str:
        """Return the role of a linear layer, one of KINDS."""
        upstream = {gemm for gemm in query.ancestors(node.inputs[:1], stop=_stops) if gemm.op_type in query.GEMM_OPS}
        sees_latent = LATENT in self._dependencies[node]
        cores = self.cores_below(node)
        if cores and not sees_latent:
            return "cross-attention kv"
        if cores:
            return "cross-attention q" if self._is_cross(cores) else "self-attention qkv"
        if upstream and all(_is_core(gemm) for gemm in upstream):
            return "cross-attention out" if self._is_cross(upstream) else "self-attention out"
        if not sees_latent:
            return "text out" if upstream & self._quantised else "text in"
        return "feed-forward out" if len(upstream) == 1 else "feed-forward in"

    def cores_below(self, node: ir.Node) -> list[ir.Node]:
        """Return the attention core GEMMs that read this node's output without another GEMM between."""
        return [gemm for gemm in dict.fromkeys(user for user, _ in query.gemms_below(node)) if _is_core(gemm)]

    def _is_cross(self, cores: Iterable[ir.Node]) -> bool:
        producers = [value.producer() for core in cores for value in core.inputs if value is not None]
        return any(producer is not None and LATENT not in self._dependencies[producer] for producer in producers)


def _stops(node: ir.Node) -> bool:
    return node.op_type in query.GEMM_OPS or query.gives_sizes(node)


def _is_core(node: ir.Node) -> bool:
    return query.weight_initializer(node) is None
