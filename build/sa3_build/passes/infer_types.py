"""Make somebody else's graph readable: constants where they are looked for, no dead casts, a type on every value."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.passes.base import Pass, PassResult


class InferTypes(Pass):
    """Give every value its type: published graphs state none, and no precision can be judged without.

    ONNX's own inference in its strict mode, which refuses a node whose inputs do not go together. A graph with a type
    on every value is left as it is.
    """

    name = "types"

    def call(self, model: ir.Model) -> PassResult:
        bare = [value for node in model.graph for value in node.outputs if value.dtype is None]
        if not bare:
            return PassResult(self.name, {"typed": 0})
        try:
            inferred = onnx.shape_inference.infer_shapes(
                ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True
            )
        except onnx.shape_inference.InferenceError as error:
            raise GraphNotRecognised(f"its types contradict each other: {_one_line(str(error))}") from None
        found = {value.name: ir.serde.deserialize_value_info_proto(value, None) for value in inferred.graph.value_info}
        for node in model.graph:
            for value in node.outputs:
                known = found.get(str(value.name))
                if known is not None and not value.is_graph_output():
                    value.type = value.type or known.type
                    value.shape = value.shape or known.shape
        return PassResult(self.name, {"typed": len(bare)})

    def ensures(self, model: ir.Model) -> None:
        for node in model.graph:
            for value in node.outputs:
                if value.dtype is None and value.uses():
                    raise GraphNotRecognised(f"the type of {value.name}, an output of {described(node)}, is not known")


def _one_line(text: str) -> str:
    return " ".join(text.split())
