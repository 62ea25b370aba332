"""Minimal ONNX files for tests in which only a graph's names and digests matter."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from sa3_trt_core.shapes import CONTRACTS

TYPES = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "int64": TensorProto.INT64}


def with_sidecar(location: str, name: str = "graph") -> bytes:
    """Return a graph of one node with one weight in a sidecar named `location`."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        weight.external_data.add(key=key, value=value)
    values = [helper.make_tensor_value_info(value, TensorProto.FLOAT, [2]) for value in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], name, values[:1], values[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()


def contract_graph(kind: str, spoilt: bool = False, name: str = "graph") -> bytes:
    """Return a minimal graph with a contract's inputs and outputs: zeros of the output's shape.

    `spoilt` adds a MatMul of shapes that do not fit, which onnx accepts and an engine builder refuses.
    """
    (source,), (result,) = CONTRACTS[kind].inputs, CONTRACTS[kind].outputs
    weights = {
        "nothing": np.zeros((), np.float32),
        "misfit": np.zeros((3, 3), np.float32),
        "axis": np.array([len(source.dims) - 1], np.int64),
        "frame": np.array([4096], np.int64),
        "least": np.array([1], np.int64),
    }
    turn = "Div" if kind == "same-encoder" else "Mul"
    nodes = [
        helper.make_node("MatMul", ["misfit", source.name], ["taken"])
        if spoilt
        else helper.make_node("Identity", [source.name], ["taken"]),
        helper.make_node("ReduceSum", ["taken"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "nothing"], ["zero"]),
        helper.make_node("Shape", [source.name], ["shape"]),
        helper.make_node("Gather", ["shape", "axis"], ["length"]),
        helper.make_node(turn, ["length", "frame"], ["other"]),
    ]
    parts = []
    for at, dim in enumerate(result.dims):
        parts.append("other" if isinstance(dim, str) else f"dim{at}")
        if isinstance(dim, int):
            weights[parts[-1]] = np.array([dim], np.int64)
    nodes += [
        helper.make_node("Concat", parts, ["wanted"], axis=0),
        helper.make_node("Expand", ["zero", "wanted"], ["wide"]),
        helper.make_node("Cast", ["wide"], [result.name], to=TYPES[result.dtype]),
    ]
    values = [helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], spec.dims) for spec in (source, result)]
    stored = [numpy_helper.from_array(value, key) for key, value in weights.items()]
    graph = helper.make_graph(nodes, name, values[:1], values[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()


def private_copy(path: Path, folder: Path) -> Path:
    """Copy a graph and its sidecar to `folder`: a build may have hard-linked the original, which onnx refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in (path, path.with_name(f"{path.name}.data")):
        shutil.copyfile(file, folder / file.name)
    return folder / path.name
