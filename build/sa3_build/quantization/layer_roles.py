"""What each quantised product of a DiT does, and in which layer: read from the graph, which keeps no module names."""

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
class Place:
    """What a product does, and in which layer; None where it belongs to no layer."""

    kind: str
    layer: int | None


def places(model: ir.Model, selection: Selection) -> dict[str, Place]:
    """The place of every quantised product, by node name, in a sorted graph.

    A product is known by its nearest products up and down the data. Into the attention core go q, k and v; out of it
    comes the input of the attention's own output product; attention is cross-attention when an operand of its core
    does not depend on the latent. The rest of the text path depends on no latent. A feed-forward's second product has
    one product above it, its first: every other one reads the residual stream, which many have written to.
    """
    by_name = {str(node.name): node for node in model.graph}
    products = [by_name[product.node] for product in selection.quantized]
    finder = _Finder(model, frozenset(products))
    kinds = {node: finder.kind(node) for node in products}
    ends = {node for node, kind in kinds.items() if kind == "feed-forward out"}
    found = {}
    for node, kind in kinds.items():
        inside = kind.startswith(("self", "cross", "feed"))
        readers = finder.cores_below(node) or [node]
        layer = len(query.ancestors(value for reader in readers for value in reader.inputs) & ends)
        found[str(node.name)] = Place(kind, layer if inside else None)
    return found


class _Finder:
    """The relations between the products of one graph."""

    def __init__(self, model: ir.Model, quantised: frozenset[ir.Node]) -> None:
        self._behind = query.graph_inputs_behind(model)
        self._quantised = quantised

    def kind(self, node: ir.Node) -> str:
        above = {one for one in query.ancestors(node.inputs[:1], stop=_stops) if one.op_type in query.PRODUCTS}
        sees_latent = LATENT in self._behind[node]
        fed = self.cores_below(node)
        if fed and not sees_latent:
            return "cross-attention kv"
        if fed:
            return "cross-attention q" if self._is_cross(fed) else "self-attention qkv"
        if above and all(_is_core(one) for one in above):
            return "cross-attention out" if self._is_cross(above) else "self-attention out"
        if not sees_latent:
            return "text out" if above & self._quantised else "text in"
        return "feed-forward out" if len(above) == 1 else "feed-forward in"

    def cores_below(self, node: ir.Node) -> list[ir.Node]:
        """The attention products that read what this product gives, with no other product between."""
        return [one for one in dict.fromkeys(user for user, _ in query.products_below(node)) if _is_core(one)]

    def _is_cross(self, cores: Iterable[ir.Node]) -> bool:
        producers = [value.producer() for core in cores for value in core.inputs if value is not None]
        return any(producer is not None and LATENT not in self._behind[producer] for producer in producers)


def _stops(node: ir.Node) -> bool:
    return node.op_type in query.PRODUCTS or query.gives_sizes(node)


def _is_core(node: ir.Node) -> bool:
    return query.weight_of(node) is None
