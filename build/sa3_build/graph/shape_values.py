"""Follow the integer arithmetic that computes shapes in a graph: each small value as known lengths, or not at all.

Values are arrays of any rank. What only moves entries is done by NumPy on the entries themselves; arithmetic is done on
lengths; and whatever is made of plain numbers alone is computed by ONNX's own reference evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sa3_build.graph.shape_rules import INTEGERS, MOST, RULES, Numbers, array_of, each
from sa3_build.graph.symbolic_dim import Length

_DRAWN = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")
Read = Callable[[ir.Value | None], Numbers | None]


def of_constant(value: ir.Value) -> Numbers | None:
    """The numbers of a small constant, else None."""
    tensor = value.const_value
    if tensor is None or tensor.size > MOST:
        return None
    array = tensor.numpy()
    if value.dtype == ir.DataType.BOOL or (value.dtype is not None and value.dtype.is_floating_point()):
        return array_of(list(array.reshape(-1)), array.shape)  # its own scalars: Python's would round otherwise
    return each(lambda number: Length(int(number)), array) if value.dtype in INTEGERS else None


def of_node(node: ir.Node, read: Read, opset: int | None = None) -> Numbers | None:
    """The numbers that a node gives, when its inputs are known well enough and its op is one of shape arithmetic."""
    inputs = [read(value) for value in node.inputs if value is not None]
    known = [found for found in inputs if found is not None]
    if not known or len(known) < len(inputs) or len(node.outputs) != 1:
        return None
    rule = RULES.get(node.op_type)
    try:
        found = rule(node, known) if rule is not None else None
    except IndexError as error:
        raise ValueError(str(error)) from None
    if found is None and opset is not None and node.op_type not in _DRAWN:
        found = _evaluated(node, known, opset)
    return found if found is not None and found.size <= MOST else None


def as_constant(found: Numbers, dtype: ir.DataType) -> np.ndarray | None:
    """Plain numbers as an array of a type, or None when a symbol or an unknown is among them."""
    plain = []
    for entry in found.reshape(-1):
        number = entry.number if isinstance(entry, Length) else entry
        if number is None:
            return None
        plain.append(number)
    return np.array(plain, dtype=dtype.numpy()).reshape(found.shape)


def _evaluated(node: ir.Node, inputs: Sequence[Numbers], opset: int) -> Numbers | None:
    """One node on plain numbers by ONNX's reference evaluator; None with a symbol among them or an unknown op."""
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
        (found,) = ReferenceEvaluator(model).run(None, feeds)
    except Exception:  # whatever it cannot do is not known
        return None
    array = np.asarray(found)
    if result.dtype == ir.DataType.BOOL:
        return array_of(list(array.reshape(-1)), array.shape)
    return each(lambda number: Length(int(number)), array) if array.size <= MOST else None
