"""Recognise a rotary table that is a constant already: there is no Cos or Sin to find it by."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query


def reads_baked_table(node: ir.Node) -> bool:
    """Is this a slice, as long as the run, of a constant of cosines or sines: floats within 1, more than one axis?"""
    if node.op_type != "Slice" or len(node.inputs) < 3 or not any(user.op_type == "Mul" for user in _users(node)):
        return False
    table, end = query.constant_of(node.inputs[0]), node.inputs[2]
    if table is None or end is None or query.constant_of(end) is not None:
        return False
    return table.ndim > 1 and table.dtype.kind == "f" and bool(np.all(np.abs(table) <= 1))


def _users(node: ir.Node) -> list[ir.Node]:
    """What reads the slice, seen through what only moves or casts it."""
    found: list[ir.Node] = []
    queue = [use.node for use in node.outputs[0].uses()]
    while queue:
        user = queue.pop()
        if user.op_type in ("Cast", "Unsqueeze", "Squeeze", "Reshape"):
            queue.extend(use.node for use in user.outputs[0].uses())
        else:
            found.append(user)
    return found
