"""Selection of the linear layers that are quantised to FP8, by structure.

A DiT spends almost all of its time in the linear layers (MatMul or Gemm with a constant weight) of its trunk: attention
projections and feed-forwards. These run in FP8: activation and weight are rounded to E4M3 codes with a scale each
(e4m3.py, scales.py), which halves the weights and doubles the throughput of the matrix units. Layers whose errors reach
the output unattenuated, or whose input range does not fit one scale per tensor, stay in 16 bits or fp32 (see
select_linears). Layers are identified by the graph inputs that they depend on, because graphs of other exporters have
other names.
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

KEPT = "kept: target cosine"  # exclusion reason of a layer that could be quantised


@dataclass(frozen=True)
class Linear:
    """One linear layer (MatMul or Gemm with a weight): node, weight and activation by name, K and N.

    `channel_axis` is the weight's axis of output channels, None if the whole weight has one scale.
    """

    node: str
    weight: str
    activation: str
    k: int
    n: int
    channel_axis: int | None


@dataclass(frozen=True)
class Selection:
    """The linear layers that are quantised, and for each other one the reason why it is not.

    `token_macs_elsewhere` counts the multiply-adds per token of layers that are not quantised.
    """

    quantized: tuple[Linear, ...]
    excluded: dict[str, str]
    token_macs_elsewhere: int

    @property
    def activations(self) -> tuple[str, ...]:
        """Distinct activations to scale, in graph order; layers that share an input share a scale."""
        return tuple(dict.fromkeys(linear.activation for linear in self.quantized))

    @property
    def fp8_share(self) -> float:
        """Share of a token's multiply-adds in linear layers that run in FP8.

        The front end runs once per row and is not counted.
        """
        fp8 = sum(linear.k * linear.n for linear in self.quantized)
        return fp8 / (fp8 + self.token_macs_elsewhere)


def fp8_share(model: ir.Model) -> float:
    """Return the share of a token's multiply-adds that run in FP8, counted in a quantised graph."""
    model.graph.sort()
    dependencies = query.input_dependencies(model)
    fp8 = total = 0
    for node in model.graph:
        weight = stored_weight(node)
        if weight is not None and not dependencies[node] <= SCALAR_INPUTS:
            macs = int(np.prod(weight.shape.numpy())) if weight.shape is not None else 0
            total += macs
            fp8 += macs if all(dequantizers(node)) else 0
    return fp8 / total if total else 0.0


def select_linears(model: ir.Model) -> Selection:
    """Return the trunk's linear layers, selected by the inputs that each depends on, not by name.

    Excluded are: products of two activations (the attention core); the front end (depends only on t and seconds_total,
    runs once per batch entry, and its features near sigma = 1 need fp32); the local embedding (its 0/1 mask has no FP8
    scale if calibration contains no in-painting); and the first and last layer. These two are a thousandth of the work.
    All of the latent passes through the first, and the rounding error of the last is added to the velocity directly
    (two thirds of all FP8 error on trained weights, build/NOTES.md).
    """
    dependencies = query.input_dependencies(model)
    last = _last_gemms(model)
    quantized, excluded, elsewhere = [], {}, 0
    for node in model.graph:
        if node.op_type not in query.GEMM_OPS:
            continue
        weight = query.weight_initializer(node)
        if weight is None:
            _require_two_activations(node, dependencies)
            excluded[str(node.name)] = "attention core: no weight"
        elif dependencies[node] <= SCALAR_INPUTS:
            excluded[str(node.name)] = "front end: timestep and duration embedding"
        elif dependencies[node] == {"local_add_cond"}:
            excluded[str(node.name)] = "local embedding"
            elsewhere += int(np.prod(weight.shape.numpy())) if weight.shape is not None else 0
        elif dependencies[node] == {LATENT} or node in last:
            excluded[str(node.name)] = "velocity out" if node in last else "latent in"
            elsewhere += int(np.prod(weight.shape.numpy())) if weight.shape is not None else 0
        else:
            quantized.append(linear_of(node, weight))
    if not quantized:
        raise GraphNotRecognised("no linear layer of the trunk")
    return Selection(tuple(quantized), excluded, elsewhere)


def linear_of(node: ir.Node, weight: ir.Value, per_channel: bool = True) -> Linear:
    """Return the record of a linear layer."""
    k, n = weight.shape.numpy() if weight.shape is not None else (0, 0)
    transposed = bool(node.attributes.get_int("transB", 0))
    if transposed:
        k, n = n, k
    axis = (0 if transposed else 1) if per_channel else None
    activation = node.inputs[0]
    assert activation is not None
    return Linear(str(node.name), str(weight.name), str(activation.name), k, n, axis)


def keep(selection: Selection, nodes: Collection[str]) -> Selection:
    """Return a selection with the layers `nodes` left in 16 bits, for a target cosine."""
    kept = [linear for linear in selection.quantized if linear.node in nodes]
    quantized = tuple(linear for linear in selection.quantized if linear.node not in nodes)
    excluded = {**selection.excluded, **dict.fromkeys((linear.node for linear in kept), KEPT)}
    return Selection(quantized, excluded, selection.token_macs_elsewhere + sum(linear.k * linear.n for linear in kept))


def in_groups(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Yield names in order, in groups whose sizes sum to at most `limit`, at least one name each."""
    group: list[str] = []
    total = 0
    for name, size in sizes.items():
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


def columns(measured: Selection, selected: Selection) -> list[int]:
    """Return the indices of the activations of `selected` among those of `measured`."""
    column_of = {name: index for index, name in enumerate(measured.activations)}
    return [column_of[name] for name in selected.activations]


def _last_gemms(model: ir.Model) -> set[ir.Node]:
    """Return the MatMul and Gemm nodes without another one downstream, in a sorted graph."""
    feeding: set[ir.Node] = set()
    last = set()
    for node in reversed(model.graph):
        users = {use.node for value in node.outputs for use in value.uses()}
        if any(user.op_type in query.GEMM_OPS or user in feeding for user in users):
            feeding.add(node)
        elif node.op_type in query.GEMM_OPS:
            last.add(node)
    return last


def _require_two_activations(node: ir.Node, dependencies: Mapping[ir.Node, frozenset[str]]) -> None:
    """Raise GraphNotRecognised if an operand is computed from constants: such a weight would stay in 16 bits."""
    for value in node.inputs[:2]:
        producer = value.producer() if value is not None else None
        constant = not dependencies[producer] if producer is not None else value is not None and value.is_initializer()
        if constant and value is not None:
            origin = described(producer) if producer is not None else f"initializer {value.name}"
            raise GraphNotRecognised(f"{described(node)} has a computed weight: {origin}")
