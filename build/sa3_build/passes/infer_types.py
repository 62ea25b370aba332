"""Infer the type of every value of a graph."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.passes.base import Pass, PassResult


class InferTypes(Pass):
    """Set the type of every value: published graphs do not state types, and conversion to 16 bits requires them.

    Uses ONNX's inference in strict mode, which refuses a node with incompatible inputs. A graph whose values all have
    types is not changed.
    """

    name = "types"

    def call(self, model: ir.Model) -> PassResult:
        untyped = [value for node in model.graph for value in node.outputs if value.dtype is None]
        if not untyped:
            return PassResult(self.name, {"typed": 0})
        try:
            inferred = onnx.shape_inference.infer_shapes(
                ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True
            )
        except onnx.shape_inference.InferenceError as error:
            raise GraphNotRecognised(f"inconsistent types: {_one_line(str(error))}") from None
        inferred_values = {
            value.name: ir.serde.deserialize_value_info_proto(value, None) for value in inferred.graph.value_info
        }
        for node in model.graph:
            for value in node.outputs:
                inferred_value = inferred_values.get(str(value.name))
                if inferred_value is not None and not value.is_graph_output():
                    value.type = value.type or inferred_value.type
                    value.shape = value.shape or inferred_value.shape
        return PassResult(self.name, {"typed": len(untyped)})

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            for value in node.outputs:
                if value.dtype is None and value.uses():
                    raise GraphNotRecognised(f"unknown type of {value.name}, an output of {described(node)}")


def _one_line(text: str) -> str:
    return " ".join(text.split())
