"""An exported SAME decoder in the form of the published ones: each window attention is one plug-in node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from sa3_build.graph import io as graph_io

SEGMENT = 17


def plug_in(source: Path, target: Path) -> int:
    """Write `source`, an exported decoder of plain ops, with plug-ins in place of its attentions; returns how many.

    The rotated q1, q2 and k1, k2 and twice v go in as (1, 17 L, 2H, D): what the published op takes.
    """
    model = graph_io.load(source)
    model.graph.sort()
    differences = [node for node in model.graph if node.op_type == "Sub" and _mixes(node)]
    for number, node in enumerate(differences):
        _replace(model, node, f"swa_{number}")
    model.opset_imports["samel"] = 1
    model.graph.sort()
    ir.passes.common.RemoveUnusedNodesPass()(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    graph_io.save(model, target)
    return len(differences)


def _mixes(node: ir.Node) -> bool:
    return all(value is not None and (made := value.producer()) and made.op_type == "MatMul" for value in node.inputs)


def _replace(model: ir.Model, node: ir.Node, prefix: str) -> None:
    queries, keys, values = [], [], []
    for mixed in (value.producer() for value in node.inputs):
        softmax = mixed.inputs[0].producer()
        scores = softmax.inputs[0].producer().inputs[0].producer()
        queries.append(_whole(scores.inputs[0]))
        keys.append(_whole(scores.inputs[1]))
        values.append(_whole(mixed.inputs[1]))
    made: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        found = ir.node(op_type, inputs, attributes, name=f"{prefix}_{len(made)}")  # type: ignore[arg-type]
        found.outputs[0].name, found.outputs[0].dtype = f"{prefix}_{len(made)}_out", ir.DataType.FLOAT
        made.append(found)
        return found.outputs[0]

    def constant(numbers: list[int], name: str) -> ir.Value:
        value = ir.val(f"{prefix}_{name}", const_value=ir.tensor(np.array(numbers), name=f"{prefix}_{name}"))
        model.graph.register_initializer(value)
        return value

    heads, width = int(values[0].shape[3]), int(values[0].shape[4])
    flat = constant([1, -1, 2 * heads, width], "flat")
    parts = [add("Reshape", [add("Concat", pair, axis=3), flat]) for pair in (queries, keys, values)]
    swa = ir.node("diff_attn_swa", parts, {"num_heads": heads}, domain="samel", name=f"{prefix}_plugin")
    swa.outputs[0].name, swa.outputs[0].dtype = f"{prefix}_attended", ir.DataType.FLOAT
    made.append(swa)
    segmented = constant([1, -1, SEGMENT, heads * width], "segmented")
    merged = node.outputs[0].uses()[0].node.outputs[0].uses()[0].node.outputs[0]  # behind Transpose and Reshape
    result = add("Reshape", [swa.outputs[0], segmented])
    model.graph.insert_before(next(iter(merged.uses())).node, made)
    ir.convenience.replace_all_uses_with(merged, result)


def _whole(value: ir.Value) -> ir.Value:
    """The (1, L, 17, H, D) that a query, or the windows of keys or values, are made of."""
    node = value.producer()
    while node.op_type != "Transpose" or len(node.inputs[0].shape or ()) != 5 or node.inputs[0].shape[2] != SEGMENT:
        node = node.inputs[0].producer()
    return node.inputs[0]
