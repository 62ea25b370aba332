"""Convert a graph of an older opset to 19, the first one with FP8 types, by rewriting the ops that changed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.passes.base import PassResult

FP8_OPSET = 19
MIN_OPSET = 13  # in older opsets Squeeze, Unsqueeze and ReduceSum also have their axes as attributes
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
    """Convert opset 13..18 to 19; a graph of opset 19 or later is not changed.

    Changing only the number would break the file: since 18 the Reduce ops have their axes as an input and Split states
    its number of parts. Other ops whose definition changed are refused by name. ONNX's converter is not used: it
    serialises the weights and drops fields that it does not know.
    """

    name = "opset"

    def requires(self, model: ir.Model) -> None:
        opset = model.opset_imports.get("") or 0
        if opset < MIN_OPSET:
            raise GraphNotRecognised(f"unsupported opset {opset} (supported: >={MIN_OPSET})")
        for node in model.graph:
            if node.domain not in ("", "ai.onnx"):
                continue  # find_dit_islands refuses ops of custom domains
            if node.op_type in COMPATIBLE | AXES_BECAME_INPUT | {"Split"}:
                continue
            if _version(node.op_type, opset) != _version(node.op_type, max(opset, FP8_OPSET)):
                raise GraphNotRecognised(f"{described(node)} differs between opset {opset} and opset {FP8_OPSET}")

    def call(self, model: ir.Model) -> PassResult:
        opset = model.opset_imports.get("") or 0
        if opset >= FP8_OPSET:
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
            assert not (node.op_type in AXES_BECAME_INPUT and "axes" in node.attributes), (
                f"{node.name} still has the attribute axes"
            )


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
        return None  # unknown to ONNX at both opsets
