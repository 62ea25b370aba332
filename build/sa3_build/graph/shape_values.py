"""Evaluate the integer arithmetic that computes shapes: each small value as known lengths, or unknown.

Values are arrays of any rank. Ops that only move entries are computed by NumPy on the entries; arithmetic is computed
on lengths; ops on plain numbers are computed by ONNX's reference evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sa3_build.graph.shape_rules import INTEGERS, MAX_ENTRIES, RULES, Numbers, array_of, each
from sa3_build.graph.symbolic_dim import Length

_DRAWN = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
Read = Callable[[ir.Value | None], Numbers | None]


def of_constant(value: ir.Value) -> Numbers | None:
    """Return the numbers of a small constant, else None."""
    tensor = value.const_value
    if tensor is None or tensor.size > MAX_ENTRIES:
        return None
    array = tensor.numpy()
    if value.dtype == ir.DataType.BOOL or (value.dtype is not None and value.dtype.is_floating_point()):
        return array_of(list(array.reshape(-1)), array.shape)  # NumPy scalars: Python's would round differently
    return each(lambda number: Length(int(number)), array) if value.dtype in INTEGERS else None


def of_node(node: ir.Node, read: Read, opset: int | None = None) -> Numbers | None:
    """Return the numbers that a node computes, or None.

    None when an input is unknown or when the op is not shape arithmetic. Raises ValueError for an index outside an
    axis.
    """
    inputs = [read(value) for value in node.inputs if value is not None]
    known = [numbers for numbers in inputs if numbers is not None]
    if not known or len(known) < len(inputs) or len(node.outputs) != 1:
        return None
    rule = RULES.get(node.op_type)
    try:
        result = rule(node, known) if rule is not None else None
    except IndexError as error:
        raise ValueError(str(error)) from None
    if result is None and opset is not None and node.op_type not in _DRAWN:
        result = _evaluated(node, known, opset)
    return result if result is not None and result.size <= MAX_ENTRIES else None


def as_constant(numbers: Numbers, dtype: ir.DataType) -> np.ndarray | None:
    """Return plain numbers as an array of a type, or None when an entry is symbolic or unknown."""
    plain = []
    for entry in numbers.reshape(-1):
        number = entry.number if isinstance(entry, Length) else entry
        if number is None:
            return None
        plain.append(number)
    return np.array(plain, dtype=dtype.numpy()).reshape(numbers.shape)


def _evaluated(node: ir.Node, inputs: Sequence[Numbers], opset: int) -> Numbers | None:
    """Return the output of one node on plain numbers by ONNX's reference evaluator, or None.

    None with a symbolic entry or an op that the evaluator does not support.
    """
    values, feeds = [value for value in node.inputs if value is not None], {}
    for value, numbers in zip(values, inputs, strict=True):
        array = as_constant(numbers, value.dtype) if value.dtype is not None else None
        if array is None:
            return None
        feeds[str(value.name)] = array
    result = node.outputs[0]
    if result.dtype not in INTEGERS:
        return None
    graph = onnx.helper.make_graph(
        [ir.to_proto(node)], "one",
        [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
         for name, array in feeds.items()],
        [onnx.helper.make_tensor_value_info(str(result.name), int(result.dtype), None)],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        (output,) = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # an op that the evaluator does not support: the value stays unknown
        return None
    array = np.asarray(output)
    if result.dtype == ir.DataType.BOOL:
        return array_of(list(array.reshape(-1)), array.shape)
    return each(lambda number: Length(int(number)), array) if array.size <= MAX_ENTRIES else None
