"""Follow the integer arithmetic that computes shapes in a graph: each small value as known lengths, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sa3_build.graph.symbolic_dim import Length

MOST = 64  # entries; nothing longer is a shape
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
Numbers = np.ndarray  # of Length, float, bool or None (not known); of rank 0 or 1
Read = Callable[[ir.Value | None], Numbers | None]


def of_constant(value: ir.Value) -> Numbers | None:
    """The numbers of a small constant, else None."""
    tensor = value.const_value
    if tensor is None or tensor.size > MOST or len(tensor.shape) > 1:
        return None
    array = tensor.numpy()
    if value.dtype == ir.DataType.BOOL or (value.dtype is not None and value.dtype.is_floating_point()):
        return _array(list(array.reshape(-1)), array.shape)  # its own scalars: Python's would round otherwise
    return _each(lambda number: Length(int(number)), array) if value.dtype in INTEGERS else None


def of_node(node: ir.Node, read: Read) -> Numbers | None:
    """The numbers that a node gives, when its inputs are known well enough and its op is one of shape arithmetic."""
    rule = _RULES.get(node.op_type)
    inputs = [found for found in map(read, node.inputs) if found is not None]
    if rule is None or not inputs or len(inputs) < len(node.inputs):
        return None
    return rule(node, inputs)


def as_constant(found: Numbers, dtype: ir.DataType) -> np.ndarray | None:
    """Plain numbers as an array of a type, or None when a symbol or an unknown is among them."""
    plain = []
    for entry in found.reshape(-1):
        number = entry.number if isinstance(entry, Length) else entry
        if number is None:
            return None
        plain.append(number)
    return np.array(plain, dtype=dtype.numpy()).reshape(found.shape)


def whole(found: Numbers | None) -> list[int] | None:
    """Numbers as plain integers, or None when one is not known or is a symbol."""
    if found is None:
        return None
    plain = [entry.number if isinstance(entry, Length) else None for entry in found.reshape(-1)]
    return None if None in plain else [number for number in plain if number is not None]


def _each(function: Callable[..., object], *arrays: np.ndarray) -> Numbers:
    """A function of single entries on arrays that broadcast; unknown in, unknown out."""
    spread = np.broadcast_arrays(*(np.asarray(array, dtype=object) for array in arrays))
    result = np.empty(spread[0].shape, dtype=object)
    for index in np.ndindex(result.shape):
        entries = [array[index] for array in spread]
        result[index] = None if any(entry is None for entry in entries) else function(*entries)
    return result


def _gather(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    indices = whole(inputs[1])
    if indices is None or inputs[0].ndim != 1:
        return None
    return _array([inputs[0][index] for index in indices], inputs[1].shape)


def _slice(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    bounds = [whole(found) for found in inputs[1:]]
    if any(found is None for found in bounds) or inputs[0].ndim != 1:
        return None
    starts, ends, *rest = [found[0] for found in bounds if found]
    step = rest[1] if len(rest) > 1 else 1
    return inputs[0][slice(starts, None if step > 0 and ends > MOST else ends, step)]


def _concat(node: ir.Node, inputs: list[Numbers]) -> Numbers:
    return np.concatenate([found.reshape(-1) for found in inputs])


def _reshape(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    target = whole(inputs[1])
    return inputs[0].reshape(target) if target in ([-1], [inputs[0].size]) else None


def _unsqueeze(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    return inputs[0].reshape(1) if inputs[0].ndim == 0 else None


def _squeeze(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    return inputs[0].reshape(()) if inputs[0].size == 1 else None


def _cast(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    wanted = ir.DataType(node.attributes["to"].as_int())
    if wanted in INTEGERS[:2]:
        return _each(lambda entry: entry if isinstance(entry, Length) else Length(int(entry)), inputs[0])
    if not wanted.is_floating_point():
        return None
    return _each(lambda entry: _float(entry, wanted), inputs[0])


def _float(entry: object, wanted: ir.DataType) -> object:
    number = entry.number if isinstance(entry, Length) else entry
    return None if number is None else wanted.numpy().type(number)


def _constant_of_shape(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    shape, fill = whole(inputs[0]), node.attributes.get("value")
    if shape is None or len(shape) != 1 or shape[0] > MOST or fill is None or fill.as_tensor().dtype not in INTEGERS:
        return None
    return _array([Length(int(fill.as_tensor().numpy().reshape(-1)[0]))] * shape[0], (shape[0],))


def _where(node: ir.Node, inputs: list[Numbers]) -> Numbers:
    return _each(lambda chosen, first, second: first if chosen else second, *inputs)


def _arithmetic(lengths: Callable, floats: Callable) -> Callable[[ir.Node, list[Numbers]], Numbers]:
    def rule(node: ir.Node, inputs: list[Numbers]) -> Numbers:
        return _each(lambda *entries: (lengths if isinstance(entries[0], Length) else floats)(*entries), *inputs)

    return rule


def _product(first: Length, second: Length) -> Length | None:
    if second.number is not None:
        return first.times(second.number)
    return second.times(first.number) if first.number is not None else None


def _ratio(first: Length, second: Length) -> Length | None:
    return first.over(second.number) if second.number else None


def _modulo(first: Length, second: Length) -> Length | None:
    return Length(first.number % second.number) if first.number is not None and second.number else None


def _equal(first: object, second: object) -> bool | None:
    """Two lengths that are symbols may be equal all the same; that a symbol is no -1 is certain."""
    if first == second:
        return True
    if not isinstance(first, Length) or not isinstance(second, Length):
        return False
    plain = (first.number, second.number)
    return False if None not in plain or any(number is not None and number < 0 for number in plain) else None


def _array(entries: list[object], shape: tuple[int, ...]) -> Numbers:
    result = np.empty(len(entries), dtype=object)
    for index, entry in enumerate(entries):
        result[index] = entry
    return result.reshape(shape)


_RULES: dict[str, Callable[[ir.Node, list[Numbers]], Numbers | None]] = {
    "Add": _arithmetic(lambda a, b: a + b, lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b, lambda a, b: a - b),
    "Mul": _arithmetic(_product, lambda a, b: a * b),
    "Div": _arithmetic(_ratio, lambda a, b: a / b),
    "Mod": _arithmetic(_modulo, lambda a, b: None),
    "Neg": _arithmetic(lambda a: -a, lambda a: -a),
    "Sqrt": _arithmetic(lambda a: None, np.sqrt),
    "Equal": lambda node, inputs: _each(_equal, *inputs),
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
}
