"""Widen an FP16-mixed graph of another recipe to fp32, so that this project's pass can mix it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.fp32_islands import Islands, is_float
from sa3_build.graph.rewrite import remove_unused, replace_uses
from sa3_build.passes.base import PassResult, check_sorted
from sa3_build.passes.remove_casts import FP16, FP32

_CAST_FREE = (FP16, FP32)


class WidenFp16:
    """Convert every fp16 value and initializer to fp32 and remove the casts between the two; no value changes.

    Every fp16 number is an fp32 number, so a weight that is converted back to fp16 is bit-identical. Precision that 16
    bits have lost cannot be restored: a rounded constant of an angle is refused, because no later check would detect
    it.
    """

    name = "widen-fp16"

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)
        for node in model.graph:
            for value in node.outputs:
                if value.dtype is None:
                    raise GraphNotRecognised(f"unknown type of {value.name}, an output of {described(node)}")
                if value.dtype in (ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
                    raise GraphNotRecognised(f"{described(node)} returns {value.dtype} (supported: fp16, fp32)")
        _require_exact_angles(model)

    def call(self, model: ir.Model) -> PassResult:
        nodes = sum(value.dtype == FP16 for node in model.graph for value in node.outputs)
        casts = self._drop_casts(model)
        for node in model.graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == FP16:
                node.attributes["to"] = ir.AttrInt64("to", int(FP32))
            fill = node.attributes.get("value")
            if node.op_type == "ConstantOfShape" and fill is not None and fill.as_tensor().dtype == FP16:
                widened = ir.tensor(fill.as_tensor().numpy().astype(np.float32))
                node.attributes["value"] = ir.AttrTensor("value", widened)
            for value in node.outputs:
                if value.dtype == FP16:
                    value.dtype = FP32
        widened_initializers = 0
        for value in model.graph.initializers.values():
            if value.dtype == FP16:
                _widen(value)
                widened_initializers += 1
        return PassResult(
            self.name, {"fp16_nodes": nodes, "casts_removed": casts, "initializers": widened_initializers}
        )

    def ensures(self, model: ir.Model) -> None:
        check_sorted(model)
        for value in (*(v for node in model.graph for v in node.outputs), *model.graph.initializers.values()):
            assert value.dtype != FP16, f"{value.name} is still fp16"

    @staticmethod
    def _drop_casts(model: ir.Model) -> int:
        before = len(model.graph)
        for node in model.graph:
            source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
            if node.op_type != "Cast" or source is None:
                continue
            if source.dtype in _CAST_FREE and result.dtype in _CAST_FREE:
                replace_uses(result, source)
                if result.is_graph_output() and source.producer() is not None and not source.is_graph_output():
                    _give_output(model, result, source)
        remove_unused(model, lambda node: node.op_type == "Cast")
        return before - len(model.graph)


def _give_output(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Replace a graph output by another value under the same name."""
    outputs, name = model.graph.outputs, old.name
    old.name, new.name, new.shape = f"{name}_before_widening", name, old.shape
    outputs[outputs.index(old)] = new


def fp16_mismatches(model: ir.Model, islands: Islands) -> list[str]:
    """Return the differences of an FP16-mixed graph from this project's recipe, one sentence each.

    Islands must be fp32, and the attention core must have one 16-bit type from the first MatMul to the second: an fp32
    softmax between them prevents fusion.
    """
    mismatches, island_nodes = [], islands.all()
    for node in model.graph:
        if node in island_nodes and any(value.dtype == FP16 for value in node.outputs):
            mismatches.append(f"{described(node)} must be fp32 and returns fp16")
        elif node.op_type == "Softmax" and node.outputs[0].dtype == FP32:
            mismatches.append(f"{described(node)} is an fp32 island in the attention core")
        elif node.op_type in query.GEMM_OPS and node not in island_nodes and node.outputs[0].dtype == FP32:
            mismatches.append(f"{described(node)} is a linear layer or attention product in fp32")
    return mismatches


def _require_exact_angles(model: ir.Model) -> None:
    """Raise GraphNotRecognised for an fp16 constant of a Sin or Cos argument that is not a whole number.

    384 is exact in fp16, a rounded frequency is not.
    """
    trig = [node for node in model.graph if node.op_type in ("Sin", "Cos")]
    angle_nodes = query.ancestors((value for node in trig for value in node.inputs), stop=query.gives_sizes)
    for node in (node for node in model.graph if node in angle_nodes):
        for value in node.inputs:
            if value is None or not value.is_initializer() or value.dtype != FP16 or not is_float(node):
                continue
            numbers = query.constant_of(value)
            if numbers is None or not np.array_equal(numbers, np.round(numbers)):
                raise GraphNotRecognised(
                    f"{described(node)} computes an angle from {value.name}, which was rounded to 16 bits"
                )


def _widen(value: ir.Value) -> None:
    source = value.const_value
    assert source is not None

    def widened() -> ir.TensorProtocol:
        return ir.tensor(source.numpy().astype(np.float32), name=value.name)

    value.const_value = ir.LazyTensor(widened, dtype=FP32, shape=ir.Shape(source.shape.numpy()), name=value.name)
    value.dtype = FP32
