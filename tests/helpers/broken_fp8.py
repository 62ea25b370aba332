"""Break a FP8 DiT in one chosen way that every tool still loads, as a faulty build would."""

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
    """A quantised MatMul or Gemm: node name, and the initializers of codes, weight scales and activation scale."""

    node: str
    weight: TensorProto
    weight_scales: TensorProto
    activation_scale: TensorProto


def quadruple_weight_scales(model: onnx.ModelProto, product: int = 0) -> None:
    """Multiply the scales of one weight by four without changing its codes."""
    scales = list(quantised_products(model))[product].weight_scales
    set_values(scales, numpy_helper.to_array(scales) * 4)


def round_island_to_fp16(model: onnx.ModelProto, input_name: str = "t") -> None:
    """Compute the angles of the Fourier features of input `which` (`t` or the duration) in fp16."""
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    angles = dict.fromkeys(node.input[0] for node in graph.node if node.op_type == "Cos")
    (angle,) = [
        name for name in angles if input_name in ancestors(makers, name) and len(ancestors(makers, name) & INPUTS) == 1
    ]
    island = [node for node in graph.node if ancestors(makers, angle) & set(node.output) or angle in node.output]
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    for node in island:
        for index, name in enumerate(node.input):
            if name in constants:
                half = numpy_helper.from_array(
                    numpy_helper.to_array(constants[name]).astype(np.float16), f"{name}_half"
                )
                graph.initializer.append(half)
            if name in constants or name == input_name:
                node.input[index] = f"{name}_half"
    graph.node.insert(0, helper.make_node("Cast", [input_name], [f"{input_name}_half"], to=TensorProto.FLOAT16))
    angle_maker = makers[angle]
    angle_maker.output[0] = f"{angle}_half"
    widening = helper.make_node("Cast", [f"{angle}_half"], [angle], to=TensorProto.FLOAT)
    graph.node.insert(list(graph.node).index(angle_maker) + 1, widening)
    del graph.value_info[:]


def reset_activation_scales(model: onnx.ModelProto) -> None:
    """Set every activation scale to that of an amax of 1, which was not measured."""
    for product in quantised_products(model):
        set_values(product.activation_scale, np.asarray(1 / 448))


def swap_weights(model: onnx.ModelProto) -> None:
    """Swap the weights and scales of the first two products whose weights have the same shape."""
    products = list(quantised_products(model))
    first_product, second_product = next(
        (first, second)
        for index, first in enumerate(products)
        for second in products[index + 1 :]
        if list(first.weight.dims) == list(second.weight.dims)
    )
    for field in ("weight", "weight_scales"):
        left, right = getattr(first_product, field), getattr(second_product, field)
        left.raw_data, right.raw_data = bytes(right.raw_data), bytes(left.raw_data)


def break_graph(source: Path, out: Path, damage: Callable[[onnx.ModelProto], None]) -> Path:
    """Write a broken copy of `source` with its own sidecar; return its path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    copy_folder = (
        out.parent / "whole"
    )  # another test may have hard-linked the sidecar, and onnx refuses a file with two links
    copy_folder.mkdir()
    for name in (source.name, f"{source.name}.data"):
        shutil.copyfile(source.with_name(name), copy_folder / name)
    model = onnx.load(copy_folder / source.name)
    damage(model)
    onnx.save(model, out, save_as_external_data=True, location=f"{out.name}.data", size_threshold=1024)
    return out


def quantised_products(model: onnx.ModelProto) -> Iterator[Quantised]:
    """Yield the products whose two inputs come from DequantizeLinear, in the graph's order."""
    makers = {node.output[0]: node for node in model.graph.node}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        producers = [makers.get(name) for name in node.input[:2]]
        if all(side is not None and side.op_type == "DequantizeLinear" for side in producers):
            activation, weight = producers
            yield Quantised(
                node.name, constants[weight.input[0]], constants[weight.input[1]], constants[activation.input[1]]
            )  # fmt: skip


def set_values(tensor: TensorProto, values: np.ndarray) -> None:
    """Replace a tensor's values; type and shape stay."""
    values_before = numpy_helper.to_array(tensor)
    tensor.CopyFrom(
        numpy_helper.from_array(np.broadcast_to(values, values_before.shape).astype(values_before.dtype), tensor.name)
    )


def ancestors(makers: dict[str, onnx.NodeProto], name: str) -> set[str]:
    """Return the names of all values that `name` is computed from, without itself."""
    names: set[str] = set()
    queue = [name]
    while queue:
        node = makers.get(queue.pop())
        unvisited = set(node.input) - names - {""} if node is not None else set()
        names |= unvisited
        queue += unvisited
    return names
