"""FP8 post-training quantization of a clean FP16-mixed DiT: which products, which scales, and ModelOpt in between.

ModelOpt places the Q/DQ pairs (its `max` calibration over every row); the scales it stores are then replaced by ours,
because it leaves a fixed headroom of 12.4x and calibrates nothing per sigma.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sa3_build import graph
from sa3_build.passes.base import GraphNotRecognised, described
from sa3_build.passes.fp8_weights import E4M3_MAX
from sa3_build.passes.islands import LATENT, SCALAR_INPUTS
from sa3_trt_core.calib import CalibrationSet, ChosenRows, tensors
from sa3_trt_core.console import Progress
from sa3_trt_core.errors import GateError, ToolError

FP16_SCALE_FLOOR = 2.0**-14  # the smallest normal fp16: below it a stored scale loses bits, and TensorRT refuses zero
KEPT = "kept: target cosine"  # why a product that could be quantised is not
SCALE_AGREEMENT = 0.005  # ModelOpt's scales are stored in fp16 and come from the same rows


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


def select_products(model: ir.Model) -> Selection:
    """Choose the GEMM trunk by structure: what each product depends on, never what it is called.

    Stay out: products of two activations (the attention core), the front end (only t and seconds_total behind it: a row
    a batch entry, and near sigma = 1 its features need fp32), the local embedding (its 0/1 mask has no FP8 scale
    when calibration holds no in-painting), and the first and last product: they are a thousandth of the work, all of
    the latent passes through the one and the other's rounding is the velocity's own (two thirds of all FP8 error on
    trained weights, NOTES).
    """
    behind = graph.graph_inputs_behind(model)
    last = _last_products(model)
    quantized, excluded, elsewhere = [], {}, 0
    for node in model.graph:
        if node.op_type not in graph.PRODUCTS:
            continue
        weight = graph.weight_of(node)
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
        if any(user.op_type in graph.PRODUCTS or user in feeding for user in users):
            feeding.add(node)
        elif node.op_type in graph.PRODUCTS:
            last.add(node)
    return last


def measure_amax(source: Path, selection: Selection, calibration: CalibrationSet | ChosenRows) -> np.ndarray:
    """The largest magnitude of every quantised activation in every row: (R, A), fp32, in `selection.activations` order.

    The graph gets one ReduceMax(Abs) output an activation, so that no activation is ever fetched.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    watched = {f"amax_{index}": name for index, name in enumerate(selection.activations)}
    amax = np.zeros((calibration.rows, len(watched)), np.float32)
    with (
        OnnxRuntimeEngine(source, graph.observed(source, watched, _largest_magnitude), low_memory=True) as engine,
        Progress("activation amax", calibration.rows) as progress,
    ):
        for index, row in enumerate(calibration):
            found = engine.run(tensors(row))
            amax[index] = [float(found[name]) for name in watched]
            progress.advance()
    return amax


def apply_scales(
    model: ir.Model, selection: Selection, amax: np.ndarray, headroom: float, calibrated: bool = True
) -> dict[str, Any]:
    """Set every scale of a quantised graph: activations amax * headroom / 448, weights amax / 448 a channel.

    Returns counts and the range of scales. Raises ToolError for an activation that was zero in every row or a weight
    that is zero throughout, and, when the graph is `calibrated` (by ModelOpt), GateError if that calibration saw other
    activations than we did.
    """
    by_name = {str(node.name): node for node in model.graph}
    largest = dict(zip(selection.activations, amax.max(axis=0), strict=True))
    theirs: dict[str, float] = {}
    scales: list[float] = []
    floored = 0
    for product in selection.quantized:
        pairs = dequantizers(by_name[product.node])
        if pairs[0] is None or pairs[1] is None:
            continue  # the proof says which one and stops the build
        if largest[product.activation] <= 0 or not np.isfinite(largest[product.activation]):
            raise ToolError(
                f"activation {product.activation} of {product.node} is {largest[product.activation]:g} in every row",
                "calibrate with rows that reach it: build/make_calib.py with more prompts",
            )
        if product.activation not in theirs:
            theirs[product.activation] = _scale_of(pairs[0])
            floored += _set_scale(pairs[0], wanted_scale(largest[product.activation], headroom))
            scales.append(_scale_of(pairs[0]))
        weight = graph.constant_of(quantized_source(pairs[1]))
        assert weight is not None, f"the weight of {product.node} is not behind a quantizer"
        axis = None if product.channel_axis is None else pairs[1].attributes.get_int("axis", 1)
        floored += _set_scale(pairs[1], channel_amax(weight, product, axis) / E4M3_MAX)
    ratios = np.array([largest[name] / scale for name, scale in theirs.items()])
    spread = float(ratios.max() / ratios.min() - 1) if len(ratios) else 0.0
    if calibrated and spread > 2 * SCALE_AGREEMENT:
        worst = list(theirs)[int(np.argmax(np.abs(ratios / np.median(ratios) - 1)))]
        raise GateError(
            f"ModelOpt's calibration and ours disagree by {spread:.2%} (worst at {worst})",
            "the calibration rows may have changed under the run; else --keep-intermediates and compare the graphs",
        )
    return {
        "activation scales": len(theirs),
        "weight scales": len(selection.quantized),
        "activation scale range": [min(scales, default=0.0), max(scales, default=0.0)],
        "at the floor": floored,
        "agreement with ModelOpt": spread if calibrated else None,
    }


def channel_amax(weight: np.ndarray, product: Product, axis: int | None) -> np.ndarray:
    """The largest magnitude of every channel of a product's weight along `axis`, or of all of it.

    Raises ToolError when all of it is zero.
    """
    found: np.ndarray = np.abs(weight.astype(np.float32)).max(axis=tuple(a for a in range(weight.ndim) if a != axis))
    if not 0 < found.max() < np.inf:  # NaN too
        raise ToolError(
            f"weight {product.weight} of {product.node} is zero throughout or not finite",
            "the checkpoint or the graph is damaged: export the DiT again",
        )
    return found


def wanted_scale(amax: float, headroom: float) -> np.ndarray:
    """The scale of an activation: E4M3 ends at 448, and `headroom` times amax shall still fit."""
    return np.asarray(amax * headroom / E4M3_MAX)


def stored_scale(wanted: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Scales as they are stored: not under the floor, and rounded up so that amax still fits."""
    bounded = np.maximum(np.asarray(wanted, np.float32), FP16_SCALE_FLOOR)
    stored = bounded.astype(dtype)
    above = np.nextafter(stored, dtype.type(np.inf))
    return np.where(stored.astype(np.float32) < bounded, above, stored).astype(dtype)


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


def _require_two_activations(node: ir.Node, behind: Mapping[ir.Node, frozenset[str]]) -> None:
    """A product without a weight that we see must not have one all the same, or it would stay in 16 bits unnoticed."""
    for value in node.inputs[:2]:
        producer = value.producer() if value is not None else None
        fixed = not behind[producer] if producer is not None else value is not None and value.is_initializer()
        if fixed and value is not None:
            made_by = described(producer) if producer is not None else f"initializer {value.name}"
            raise GraphNotRecognised(f"{described(node)} takes a weight from where none is known: {made_by}")


def _scale_of(dequantize: ir.Node) -> float:
    scale = graph.constant_of(dequantize.inputs[1])
    assert scale is not None
    return float(scale.reshape(-1)[0])


def _set_scale(dequantize: ir.Node, wanted: np.ndarray) -> int:
    """Store the scale of a Q/DQ pair; returns how many were under the floor."""
    value = dequantize.inputs[1]
    assert value is not None and value.const_value is not None
    stored = stored_scale(wanted, value.const_value.dtype.numpy())
    value.const_value = ir.tensor(stored.reshape(value.const_value.shape.numpy()), name=value.name)
    return int((np.asarray(wanted) < FP16_SCALE_FLOOR).sum())


def _largest_magnitude(value: ir.Value) -> list[ir.Node]:
    magnitude = ir.node("Abs", [value])
    largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
    single = ir.node("Cast", largest.outputs, {"to": int(ir.DataType.FLOAT)})
    single.outputs[0].dtype, single.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
    return [magnitude, largest, single]
