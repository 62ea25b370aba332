"""Break a FP8 DiT in one chosen way that every tool still loads: what a wrong build would hand us."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sa3_trt_core.shapes import CONTRACTS

INPUTS = {spec.name for spec in CONTRACTS["dit"].inputs}


@dataclass(frozen=True)
class Quantised:
    """One product: its node's name, and the initializers of its weight's codes, weight scales and activation scale."""

    node: str
    weight: TensorProto
    weight_scales: TensorProto
    activation_scale: TensorProto


def scale_times_four(model: onnx.ModelProto, product: int = 0) -> None:
    """The scales of one product's weight are four times what its codes were made with."""
    scales = list(quantised(model))[product].weight_scales
    set_values(scales, numpy_helper.to_array(scales) * 4)


def island_in_16_bits(model: onnx.ModelProto, which: str = "t") -> None:
    """The angles of the Fourier features of `t` or of the duration are computed in fp16, from the input on."""
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    angles = dict.fromkeys(node.input[0] for node in graph.node if node.op_type == "Cos")
    (angle,) = [name for name in angles if which in above(makers, name) and len(above(makers, name) & INPUTS) == 1]
    island = [node for node in graph.node if above(makers, angle) & set(node.output) or angle in node.output]
    numbers = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for node in island:
        for index, name in enumerate(node.input):
            if name in numbers:
                half = numpy_helper.from_array(numpy_helper.to_array(numbers[name]).astype(np.float16), f"{name}_half")
                graph.initializer.append(half)
            if name in numbers or name == which:
                node.input[index] = f"{name}_half"
    graph.node.insert(0, helper.make_node("Cast", [which], [f"{which}_half"], to=TensorProto.FLOAT16))
    last = makers[angle]
    last.output[0] = f"{angle}_half"
    wide = helper.make_node("Cast", [f"{angle}_half"], [angle], to=TensorProto.FLOAT)
    graph.node.insert(list(graph.node).index(last) + 1, wide)
    del graph.value_info[:]


def uncalibrated_scales(model: onnx.ModelProto) -> None:
    """Every activation has the scale of an amax of 1, which nobody measured."""
    for product in quantised(model):
        set_values(product.activation_scale, np.asarray(1 / 448))


def swapped_weights(model: onnx.ModelProto) -> None:
    """The first two products whose weights are of one shape have each other's, scales and all."""
    products = list(quantised(model))
    one, other = next(
        (first, second)
        for index, first in enumerate(products)
        for second in products[index + 1 :]
        if list(first.weight.dims) == list(second.weight.dims)
    )
    for side in ("weight", "weight_scales"):
        left, right = getattr(one, side), getattr(other, side)
        left.raw_data, right.raw_data = bytes(right.raw_data), bytes(left.raw_data)


def break_graph(source: Path, out: Path, breaking: Callable[[onnx.ModelProto], None]) -> Path:
    """A broken copy with a sidecar of its own."""
    out.parent.mkdir(parents=True, exist_ok=True)
    apart = out.parent / "whole"  # another test may have linked the sidecar, and onnx refuses one with two names
    apart.mkdir()
    for name in (source.name, f"{source.name}.data"):
        shutil.copyfile(source.with_name(name), apart / name)
    model = onnx.load(apart / source.name)
    breaking(model)
    onnx.save(model, out, save_as_external_data=True, location=f"{out.name}.data", size_threshold=1024)
    return out


def quantised(model: onnx.ModelProto) -> Iterator[Quantised]:
    """The products whose two sides come from DequantizeLinear, in the graph's order."""
    makers = {node.output[0]: node for node in model.graph.node}
    numbers = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        pair = [makers.get(name) for name in node.input[:2]]
        if all(side is not None and side.op_type == "DequantizeLinear" for side in pair):
            activation, weight = pair
            yield Quantised(
                node.name, numbers[weight.input[0]], numbers[weight.input[1]], numbers[activation.input[1]]
            )  # fmt: skip


def set_values(tensor: TensorProto, values: np.ndarray) -> None:
    """Other values of the same type and shape."""
    kept = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.broadcast_to(values, kept.shape).astype(kept.dtype), tensor.name))


def above(makers: dict[str, onnx.NodeProto], name: str) -> set[str]:
    """Everything that a value is made of, itself left out."""
    found: set[str] = set()
    queue = [name]
    while queue:
        node = makers.get(queue.pop())
        new = set(node.input) - found - {""} if node is not None else set()
        found |= new
        queue += new
    return found
