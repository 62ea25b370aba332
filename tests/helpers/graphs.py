"""The smallest ONNX files that stand for an engine's graph where only names and digests matter."""

from __future__ import annotations

from onnx import TensorProto, helper


def with_sidecar(location: str, name: str = "graph") -> bytes:
    """A graph of one node with one weight in a sidecar of that name."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "8")):
        weight.external_data.add(key=key, value=value)
    values = [helper.make_tensor_value_info(value, TensorProto.FLOAT, [2]) for value in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], name, values[:1], values[1:], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
