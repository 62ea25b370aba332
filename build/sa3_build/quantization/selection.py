"""FP8 post-training quantization of a clean FP16-mixed DiT: which products, which scales, and ModelOpt in between.

ModelOpt places the Q/DQ pairs (its `max` calibration over every row); the scales it stores are then replaced by ours,
because it leaves a fixed headroom of 12.4x and calibrates nothing per sigma.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.fp32_islands import LATENT, SCALAR_INPUTS
from sa3_build.graph.quantizers import dequantizers, stored_weight

KEPT = "kept: target cosine"  # why a product that could be quantised is not


@dataclass(frozen=True)
class Product:
    """One weighted product of the graph: node, weight and activation by name, K and N.

    `channel_axis` is the weight's axis of output channels, None when the whole weight has one scale.
    """

    node: str
    weight: str
    activation: str
    k: int
    n: int
    channel_axis: int | None


@dataclass(frozen=True)
class Selection:
    """Which products are quantised, and why each other one is not."""

    quantized: tuple[Product, ...]
    excluded: dict[str, str]
    token_macs_elsewhere: int

    @property
    def activations(self) -> tuple[str, ...]:
        """The distinct activations to scale, in graph order; products that share an input share a scale."""
        return tuple(dict.fromkeys(product.activation for product in self.quantized))

    @property
    def fp8_share(self) -> float:
        """Share of the weighted multiply-adds of one token that run in FP8 (the front end runs once a row)."""
        fp8 = sum(product.k * product.n for product in self.quantized)
        return fp8 / (fp8 + self.token_macs_elsewhere)


def fp8_share(model: ir.Model) -> float:
    """The same share, counted in a quantised graph."""
    model.graph.sort()
    behind = query.graph_inputs_behind(model)
    fp8 = everything = 0
    for node in model.graph:
        weight = stored_weight(node)
        if weight is not None and not behind[node] <= SCALAR_INPUTS:
            macs = int(np.prod(weight.shape.numpy())) if weight.shape is not None else 0
            everything += macs
            fp8 += macs if all(dequantizers(node)) else 0
    return fp8 / everything if everything else 0.0


def select_products(model: ir.Model) -> Selection:
    """Choose the GEMM trunk by structure: what each product depends on, never what it is called.

    Stay out: products of two activations (the attention core), the front end (only t and seconds_total behind it: a row
    a batch entry, and near sigma = 1 its features need fp32), the local embedding (its 0/1 mask has no FP8 scale
    when calibration holds no in-painting), and the first and last product: they are a thousandth of the work, all of
    the latent passes through the one and the other's rounding is the velocity's own (two thirds of all FP8 error on
    trained weights, NOTES).
    """
    behind = query.graph_inputs_behind(model)
    last = _last_products(model)
    quantized, excluded, elsewhere = [], {}, 0
    for node in model.graph:
        if node.op_type not in query.PRODUCTS:
            continue
        weight = query.weight_of(node)
        if weight is None:
            _require_two_activations(node, behind)
            excluded[str(node.name)] = "attention core: no weight"
        elif behind[node] <= SCALAR_INPUTS:
            excluded[str(node.name)] = "front end: timestep and duration embedding"
        elif behind[node] == {"local_add_cond"}:
            excluded[str(node.name)] = "local embedding"
            elsewhere += int(np.prod(weight.shape.numpy())) if weight.shape is not None else 0
        elif behind[node] == {LATENT} or node in last:
            excluded[str(node.name)] = "velocity out" if node in last else "latent in"
            elsewhere += int(np.prod(weight.shape.numpy())) if weight.shape is not None else 0
        else:
            quantized.append(product_of(node, weight))
    if not quantized:
        raise GraphNotRecognised("no weighted product of the trunk was found")
    return Selection(tuple(quantized), excluded, elsewhere)


def product_of(node: ir.Node, weight: ir.Value, per_channel: bool = True) -> Product:
    """A weighted product as a selection names it."""
    k, n = weight.shape.numpy() if weight.shape is not None else (0, 0)
    transposed = bool(node.attributes.get_int("transB", 0))
    if transposed:
        k, n = n, k
    axis = (0 if transposed else 1) if per_channel else None
    activation = node.inputs[0]
    assert activation is not None
    return Product(str(node.name), str(weight.name), str(activation.name), k, n, axis)


def keep(selection: Selection, nodes: Collection[str]) -> Selection:
    """A selection with some of its products left in 16 bits, because a target cosine asks for it."""
    kept = [product for product in selection.quantized if product.node in nodes]
    quantized = tuple(product for product in selection.quantized if product.node not in nodes)
    excluded = {**selection.excluded, **dict.fromkeys((product.node for product in kept), KEPT)}
    return Selection(quantized, excluded, selection.token_macs_elsewhere + sum(one.k * one.n for one in kept))


def in_groups(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names in order, as many together as `most` allows of their sizes, and one at least."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def columns(measured: Selection, wanted: Selection) -> list[int]:
    """Where the activations of `wanted` stand among those that `measured` gave amax for."""
    place = {name: column for column, name in enumerate(measured.activations)}
    return [place[name] for name in wanted.activations]


def _last_products(model: ir.Model) -> set[ir.Node]:
    """The products that feed no other product of a sorted graph."""
    feeding: set[ir.Node] = set()
    last = set()
    for node in reversed(model.graph):
        users = {use.node for value in node.outputs for use in value.uses()}
        if any(user.op_type in query.PRODUCTS or user in feeding for user in users):
            feeding.add(node)
        elif node.op_type in query.PRODUCTS:
            last.add(node)
    return last


def _require_two_activations(node: ir.Node, behind: Mapping[ir.Node, frozenset[str]]) -> None:
    """A product without a weight that we see must not have one all the same, or it would stay in 16 bits unnoticed."""
    for value in node.inputs[:2]:
        producer = value.producer() if value is not None else None
        fixed = not behind[producer] if producer is not None else value is not None and value.is_initializer()
        if fixed and value is not None:
            made_by = described(producer) if producer is not None else f"initializer {value.name}"
            raise GraphNotRecognised(f"{described(node)} takes a weight from where none is known: {made_by}")
