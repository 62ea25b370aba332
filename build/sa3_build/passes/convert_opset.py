"""Bring a graph of an older opset to the first one with FP8 types, by rewriting what has changed in between."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.passes.base import PassResult

FP8_OPSET = 19
OLDEST = 13  # before it Squeeze, Unsqueeze and ReduceSum took their axes as attributes as well
# Ops with a new version in 14..19 that reads old nodes as before: types were added, or attributes with a default.
COMPATIBLE = frozenset(
    (
        "Add", "Cast", "CastLike", "Constant", "CumSum", "DequantizeLinear", "Div", "Equal", "Identity", "LessOrEqual",
        "GreaterOrEqual", "Mul", "Pad", "Pow", "QuantizeLinear", "Relu", "Reshape", "ScatterElements", "ScatterND",
        "Shape", "Size", "Sub", "Tile", "Where",
    )
)  # fmt: skip
AXES_BECAME_INPUT = frozenset(
    (
        "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
        "ReduceSumSquare",
    )
)  # fmt: skip


class ConvertOpset:
    """Opset 13..18 becomes 19; a graph of 19 or later is left as it is.

    A bare change of the number breaks the file: since 18 the Reduce ops take their axes as an input and Split says in
    how many parts. An op whose meaning may have changed otherwise is refused by name. ONNX's own converter is not used:
    it serialises the weights and loses what it does not know.
    """

    name = "opset"

    def requires(self, model: ir.Model) -> None:
        found = model.opset_imports.get("") or 0
        if found < OLDEST:
            raise GraphNotRecognised(f"opset {found}; {OLDEST} or later is needed")
        for node in model.graph:
            if node.domain not in ("", "ai.onnx"):
                continue  # whoever looks for islands says which ops of other domains are none of a DiT
            if node.op_type in COMPATIBLE | AXES_BECAME_INPUT | {"Split"}:
                continue
            if _version(node.op_type, found) != _version(node.op_type, max(found, FP8_OPSET)):
                raise GraphNotRecognised(f"{described(node)} has another meaning at opset {FP8_OPSET} than at {found}")

    def call(self, model: ir.Model) -> PassResult:
        found = model.opset_imports.get("") or 0
        if found >= FP8_OPSET:
            return PassResult(self.name, {"converted": 0})
        changed = 0
        for node in model.graph:
            if node.op_type in AXES_BECAME_INPUT and "axes" in node.attributes:
                _axes_to_input(model, node)
                changed += 1
            elif node.op_type == "Split" and len(node.inputs) == 1 and "num_outputs" not in node.attributes:
                node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
                changed += 1
        model.opset_imports[""] = FP8_OPSET
        for node in model.graph:
            node.version = None
        return PassResult(self.name, {"converted": changed})

    def ensures(self, model: ir.Model) -> None:
        assert (model.opset_imports.get("") or 0) >= FP8_OPSET
        for node in model.graph:
            assert not (node.op_type in AXES_BECAME_INPUT and "axes" in node.attributes), f"{node.name} has axes still"


def _axes_to_input(model: ir.Model, node: ir.Node) -> None:
    axes = node.attributes.pop("axes").as_ints()
    name = f"{node.outputs[0].name}_axes"
    value = ir.val(name, const_value=ir.tensor(np.array(axes, np.int64), name=name))
    model.graph.register_initializer(value)
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def _version(op_type: str, opset: int) -> int | None:
    try:
        return int(onnx.defs.get_schema(op_type, opset).since_version)
    except onnx.defs.SchemaError:
        return None  # an op that ONNX does not know means the same, nothing, at both
