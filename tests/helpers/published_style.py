"""Export DiT graphs in the published style: the older exporter with its names and node patterns, at opset 17.

`write_fp32` writes the fp32 graph; published_half.py converts it to FP16-mixed.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from sa3_build.export import load_modules, torch_to_onnx
from sa3_build.export.model_config import load_geometry
from sa3_build.export.wrappers import DitContract
from sa3_trt_core.shapes import CONTRACTS

OPSET = 17
SIDECAR = "weights-of-somebody.bin"
INLINE = 1024  # bytes; smaller tensors stay in the graph file
PLACES = {"duration.": "seconds_total.embedder.embedding.", "dit.prompt_padding_embedding": "padding_embedding"}


def legacy_module(folder: Path) -> DitContract:
    """Return the torch DiT of a native checkpoint, fp32."""
    geometry = load_geometry(folder / "model_config.json")
    stored = load_modules.NativeWeights(folder / "model.safetensors")
    dit = load_modules.load_dit(stored, geometry.dit)
    return DitContract(dit, load_modules.load_duration_embedder(stored, geometry.conditioner)).eval()


def exported(
    module: torch.nn.Module, scratch: Path, batch: int | None = 1, opset: int = OPSET, length: str | None = "L"
) -> onnx.ModelProto:
    """Return the module exported by PyTorch's older exporter, with published names; `batch` None: dynamic batch axis.

    `length` is the name of the length axis; None leaves the naming of dynamic axes to the exporter.
    """
    contract = CONTRACTS["dit"]
    specs = (*contract.inputs, *contract.outputs)
    free = ("L",) if batch else ("B", "L")
    dims_by_name = {spec.name: {i: d for i, d in enumerate(spec.dims) if d in free} for spec in specs}
    axes = {name: _dynamic_axes(dims, length) for name, dims in dims_by_name.items() if dims}
    path = scratch / "traced.onnx"
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, tuple(torch_to_onnx.example_inputs("dit", batch=batch or 2, frames=34)), str(path), dynamo=False,
            opset_version=opset, do_constant_folding=False, input_names=[spec.name for spec in contract.inputs],
            output_names=["velocity"], dynamic_axes=axes,
        )  # fmt: skip
    proto = onnx.load(path)
    del proto.graph.value_info[:]
    name_as_published(proto)
    return proto


def _dynamic_axes(axes: dict[int, str], length: str | None) -> dict[int, str] | list[int]:
    """Return dynamic axes as the exporter takes them: by name, or by number alone."""
    if length is None:
        return list(axes)
    return {axis: length if name == "L" else name for axis, name in axes.items()}


def name_as_published(proto: onnx.ModelProto) -> None:
    """Rename weights and nodes to native names: `dit.transformer.layers.N....weight`, `/transformer/layers.N/...`."""
    for tensor in proto.graph.initializer:
        rename(proto, tensor.name, published_name(tensor.name))
    for node in proto.graph.node:
        node.name = node.name.replace("/dit/transformer_blocks", "/transformer/layers")


def published_name(name: str) -> str:
    for prefix, published in PLACES.items():
        if name.startswith(prefix):
            return published + name.removeprefix(prefix)
    if not name.startswith("dit."):
        return name
    return "dit." + load_modules.native_dit_key(name.removeprefix("dit.")).removeprefix(load_modules.DIT_PREFIX)


def rename(proto: onnx.ModelProto, old: str, new: str) -> None:
    for tensor in proto.graph.initializer:
        if tensor.name == old:
            tensor.name = new
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def count_positions_in_integers(proto: onnx.ModelProto) -> None:
    """Rewrite the rotary table as published: Range over integers, Cast, Div by a scale of one, Einsum."""
    (counter,) = [node for node in proto.graph.node if node.op_type == "Range"]
    numbers = [numpy_helper.from_array(np.int64(value), f"/rotary/{value}") for value in (0, 1)]
    proto.graph.initializer.extend([*numbers, numpy_helper.from_array(np.float32(1), "/rotary/scale")])
    steps = next(node for node in proto.graph.node if counter.input[1] in node.output).input[0]
    result = counter.output[0]
    counter.input[:] = ["/rotary/0", steps, "/rotary/1"]
    counter.output[0] = "/rotary/steps"
    cast = helper.make_node("Cast", ["/rotary/steps"], ["/rotary/wide"], "/rotary/Cast", to=TensorProto.FLOAT)
    divide = helper.make_node("Div", ["/rotary/wide", "/rotary/scale"], [result], "/rotary/Div")
    at = list(proto.graph.node).index(counter) + 1
    for node in (divide, cast):
        proto.graph.node.insert(at, node)


def append_redundant_casts(proto: onnx.ModelProto, every: int = 9) -> None:
    """Insert two casts that change nothing before every n-th Add, appended after all of their users."""
    sums = [node for node in proto.graph.node if node.op_type == "Add" and "norm" in node.name]
    for index, node in enumerate(sums[::every]):
        source = node.input[0]
        names = [f"/appended/{index}/{step}" for step in range(2)]
        node.input[0] = names[1]
        for before, after in zip((source, names[0]), names, strict=True):
            proto.graph.node.append(helper.make_node("Cast", [before], [after], after, to=TensorProto.FLOAT))


def shuffle_nodes(proto: onnx.ModelProto, every: int = 11) -> None:
    """Move about a tenth of the nodes to the end of the list, after their users."""
    nodes = list(proto.graph.node)
    moved = nodes[5::every]
    kept = [node for index, node in enumerate(nodes) if index < 5 or (index - 5) % every]
    del proto.graph.node[:]
    proto.graph.node.extend([*kept, *moved])


def save_graph(proto: onnx.ModelProto, path: Path, sidecar: str = SIDECAR) -> Path:
    """Save a graph with a sidecar named `sidecar`, small tensors inline; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(
        proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=sidecar, size_threshold=INLINE
    )
    return path


def write_fp32(module: DitContract, path: Path, scratch: Path, batch: int | None = 1) -> Path:
    """Write the fp32 graph of the published style; return its path."""
    proto = exported(module, scratch, batch)
    count_positions_in_integers(proto)
    append_redundant_casts(proto)
    shuffle_nodes(proto)
    return save_graph(proto, path)
