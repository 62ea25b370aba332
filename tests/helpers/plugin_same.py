"""Convert an exported SAME decoder to the published form, in which each window attention is one plug-in node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from sa3_build.graph import io as graph_io

SEGMENT = 17


def insert_plugins(source: Path, target: Path) -> int:
    """Write `source`, an exported decoder of plain ops, with plug-ins in place of its attentions; return their number.

    Inputs of the published op, each (1, 17 L, 2H, D): rotated q1 and q2, rotated k1 and k2, v twice.
    """
    model = graph_io.load(source)
    model.graph.sort()
    differences = [node for node in model.graph if node.op_type == "Sub" and _mixes_values(node)]
    for number, node in enumerate(differences):
        _replace(model, node, f"swa_{number}")
    model.opset_imports["samel"] = 1
    model.graph.sort()
    ir.passes.common.RemoveUnusedNodesPass()(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    graph_io.save(model, target)
    return len(differences)


def _mixes_values(node: ir.Node) -> bool:
    return all(value is not None and (made := value.producer()) and made.op_type == "MatMul" for value in node.inputs)


def _replace(model: ir.Model, node: ir.Node, prefix: str) -> None:
    queries, keys, values = [], [], []
    for mixed in (value.producer() for value in node.inputs):
        softmax = mixed.inputs[0].producer()
        scores = softmax.inputs[0].producer().inputs[0].producer()
        queries.append(_uncut(scores.inputs[0]))
        keys.append(_uncut(scores.inputs[1]))
        values.append(_uncut(mixed.inputs[1]))
    inserted: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"{prefix}_{len(inserted)}")  # type: ignore[arg-type]
        node.outputs[0].name, node.outputs[0].dtype = f"{prefix}_{len(inserted)}_out", ir.DataType.FLOAT
        inserted.append(node)
        return node.outputs[0]

    def constant(numbers: list[int], name: str) -> ir.Value:
        value = ir.val(f"{prefix}_{name}", const_value=ir.tensor(np.array(numbers), name=f"{prefix}_{name}"))
        model.graph.register_initializer(value)
        return value

    heads, width = int(values[0].shape[3]), int(values[0].shape[4])
    flat = constant([1, -1, 2 * heads, width], "flat")
    parts = [add("Reshape", [add("Concat", pair, axis=3), flat]) for pair in (queries, keys, values)]
    plugin = ir.node("diff_attn_swa", parts, {"num_heads": heads}, domain="samel", name=f"{prefix}_plugin")
    plugin.outputs[0].name, plugin.outputs[0].dtype = f"{prefix}_attended", ir.DataType.FLOAT
    inserted.append(plugin)
    segmented = constant([1, -1, SEGMENT, heads * width], "segmented")
    merged = node.outputs[0].uses()[0].node.outputs[0].uses()[0].node.outputs[0]  # after Transpose and Reshape
    result = add("Reshape", [plugin.outputs[0], segmented])
    model.graph.insert_before(next(iter(merged.uses())).node, inserted)
    ir.convenience.replace_all_uses_with(merged, result)


def _uncut(value: ir.Value) -> ir.Value:
    """Return the value (1, L, 17, H, D) from which a query, or the windows of keys or values, are cut."""
    node = value.producer()
    while node.op_type != "Transpose" or len(node.inputs[0].shape or ()) != 5 or node.inputs[0].shape[2] != SEGMENT:
        node = node.inputs[0].producer()
    return node.inputs[0]
