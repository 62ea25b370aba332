"""Recognise a rotary table stored as a constant, in a graph without Cos and Sin."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query

MOVING = ("Cast", "Unsqueeze", "Squeeze", "Reshape")  # ops between the slice and the Mul


def reads_baked_table(node: ir.Node) -> bool:
    """Return True for a Slice of a constant table of cosines or sines whose end is the latent length.

    The table is floating point, has more than one axis, and its entries are within [-1, 1].
    """
    if node.op_type != "Slice" or len(node.inputs) < 3:
        return False
    if all(user.op_type != "Mul" for user in query.users(node, MOVING)):
        return False
    table, end = query.constant_of(node.inputs[0]), node.inputs[2]
    if table is None or end is None or query.constant_of(end) is not None:
        return False
    return table.ndim > 1 and table.dtype.kind == "f" and bool(np.all(np.abs(table) <= 1))
