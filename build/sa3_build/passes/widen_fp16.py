"""Lift a graph that somebody mixed in another way back to fp32, so that our own pass can mix it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.errors import GraphNotRecognised, described
from sa3_build.graph.fp32_islands import Islands, is_float
from sa3_build.graph.rewrite import remove_unused, replace_uses
from sa3_build.passes.base import PassResult, check_sorted
from sa3_build.passes.remove_casts import HALF, SINGLE

_CAST_FREE = (HALF, SINGLE)


class LiftToSingle:
    """Turn every fp16 value and initializer into fp32 and take the casts between the two away: no number changes.

    Every fp16 number is an fp32 number, so a weight that is made fp16 again is the same bit for bit. What 16 bits have
    lost already cannot be lifted: a rounded constant behind an angle is refused, for there no later gate would see it.
    """

    name = "lift-to-fp32"

    def requires(self, model: ir.Model) -> None:
        check_sorted(model)
        for node in model.graph:
            for value in node.outputs:
                if value.dtype is None:
                    raise GraphNotRecognised(f"the type of {value.name}, an output of {described(node)}, is not known")
                if value.dtype in (ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
                    raise GraphNotRecognised(f"{described(node)} gives {value.dtype}; fp16 and fp32 are understood")
        _require_exact_angles(model)

    def call(self, model: ir.Model) -> PassResult:
        nodes = sum(value.dtype == HALF for node in model.graph for value in node.outputs)
        casts = self._drop_casts(model)
        for node in model.graph:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == HALF:
                node.attributes["to"] = ir.AttrInt64("to", int(SINGLE))
            fill = node.attributes.get("value")
            if node.op_type == "ConstantOfShape" and fill is not None and fill.as_tensor().dtype == HALF:
                widened = ir.tensor(fill.as_tensor().numpy().astype(np.float32))
                node.attributes["value"] = ir.AttrTensor("value", widened)
            for value in node.outputs:
                if value.dtype == HALF:
                    value.dtype = SINGLE
        lifted = 0
        for value in model.graph.initializers.values():
            if value.dtype == HALF:
                _widen(value)
                lifted += 1
        return PassResult(self.name, {"fp16 nodes": nodes, "casts removed": casts, "initializers": lifted})

    def ensures(self, model: ir.Model) -> None:
        check_sorted(model)
        for value in (*(v for node in model.graph for v in node.outputs), *model.graph.initializers.values()):
            assert value.dtype != HALF, f"{value.name} is fp16 still"

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
    """Let a value be the graph output that another one was, under its name."""
    outputs, name = model.graph.outputs, old.name
    old.name, new.name, new.shape = f"{name}_before_lift", name, old.shape
    outputs[outputs.index(old)] = new


def reasons_to_lift(model: ir.Model, islands: Islands) -> list[str]:
    """What another recipe left in 16 bits, or between two types, that ours does not; empty for a graph of ours.

    Islands must be fp32, and the attention core one 16-bit type from the first product to the second: with an fp32
    softmax between them it cannot fuse.
    """
    found, stay = [], islands.all()
    for node in model.graph:
        if node in stay and any(value.dtype == HALF for value in node.outputs):
            found.append(f"{described(node)} must be fp32 and gives fp16")
        elif node.op_type == "Softmax" and node.outputs[0].dtype == SINGLE:
            found.append(f"{described(node)} is an fp32 island in the attention core")
        elif node.op_type in query.PRODUCTS and node not in stay and node.outputs[0].dtype == SINGLE:
            found.append(f"{described(node)} is a product in fp32")
    return found


def _require_exact_angles(model: ir.Model) -> None:
    """An fp16 constant behind a Sin or Cos must be a whole number: 384 is exact, a rounded frequency is not."""
    trig = [node for node in model.graph if node.op_type in ("Sin", "Cos")]
    behind = query.ancestors((value for node in trig for value in node.inputs), stop=query.gives_sizes)
    for node in (one for one in model.graph if one in behind):
        for value in node.inputs:
            if value is None or not value.is_initializer() or value.dtype != HALF or not is_float(node):
                continue
            numbers = query.constant_of(value)
            if numbers is None or not np.array_equal(numbers, np.round(numbers)):
                raise GraphNotRecognised(
                    f"{described(node)} makes an angle from {value.name}, which was rounded to 16 bits"
                )


def _widen(value: ir.Value) -> None:
    source = value.const_value
    assert source is not None

    def widened() -> ir.TensorProtocol:
        return ir.tensor(source.numpy().astype(np.float32), name=value.name)

    value.const_value = ir.LazyTensor(widened, dtype=SINGLE, shape=ir.Shape(source.shape.numpy()), name=value.name)
    value.dtype = SINGLE
