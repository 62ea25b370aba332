"""Recognise a rotary table that is a constant already: there is no Cos or Sin to find it by."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query

MOVING = ("Cast", "Unsqueeze", "Squeeze", "Reshape")  # what lies between the slice and its product


def reads_baked_table(node: ir.Node) -> bool:
    """Is this a slice, as long as the run, of a constant of cosines or sines: floats within 1, more than one axis?"""
    if node.op_type != "Slice" or len(node.inputs) < 3:
        return False
    if all(user.op_type != "Mul" for user in query.users(node, MOVING)):
        return False
    table, end = query.constant_of(node.inputs[0]), node.inputs[2]
    if table is None or end is None or query.constant_of(end) is not None:
        return False
    return table.ndim > 1 and table.dtype.kind == "f" and bool(np.all(np.abs(table) <= 1))
