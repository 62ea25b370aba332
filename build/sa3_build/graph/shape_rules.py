"""Shape arithmetic rules, one per op: the small integer values that a node computes, entry by entry."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from sa3_build.graph.symbolic_dim import Length

MAX_ENTRIES = 64  # entries; longer integer tensors are data, not shapes
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
Numbers = np.ndarray  # of Length, float, bool or None (not known), of any rank


def each(function: Callable[..., object], *arrays: np.ndarray) -> Numbers:
    """Return `function` applied entry by entry to arrays that broadcast; None where an entry is None."""
    spread = np.broadcast_arrays(*(np.asarray(array, dtype=object) for array in arrays))
    result = np.empty(spread[0].shape, dtype=object)
    for index in np.ndindex(result.shape):
        entries = [array[index] for array in spread]
        result[index] = None if any(entry is None for entry in entries) else function(*entries)
    return result


def array_of(entries: list[object], shape: tuple[int, ...]) -> Numbers:
    """Return an object array of this shape with the entries in order."""
    result = np.empty(len(entries), dtype=object)
    for index, entry in enumerate(entries):
        result[index] = entry
    return result.reshape(shape)


def as_integers(numbers: Numbers | None) -> list[int] | None:
    """Return numbers as plain integers, or None when one is unknown or symbolic."""
    if numbers is None:
        return None
    plain = [entry.number if isinstance(entry, Length) else None for entry in numbers.reshape(-1)]
    return None if None in plain else [number for number in plain if number is not None]


def _gather(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    indices, axis = as_integers(inputs[1]), node.attributes.get_int("axis", 0)
    if indices is None:
        return None
    taken = np.take(inputs[0], np.array(indices, np.int64).reshape(-1), axis=axis)
    shape = inputs[0].shape
    axis %= len(shape)
    return taken.reshape((*shape[:axis], *inputs[1].shape, *shape[axis + 1 :]))


def _slice(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    bounds = [as_integers(numbers) for numbers in inputs[1:]]
    if any(bound is None for bound in bounds):
        return None
    starts, ends, *rest = [bound for bound in bounds if bound is not None]
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    cuts: list[slice] = [slice(None)] * inputs[0].ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = inputs[0].shape[axis]
        # A negative step with an end before the first entry runs to the start; Python would count it from the end.
        last = None if step < 0 and end < -size else end
        cuts[axis] = slice(start, last, step)
    return inputs[0][tuple(cuts)]


def _concat(node: ir.Node, inputs: list[Numbers]) -> Numbers:
    return np.concatenate([np.atleast_1d(numbers) for numbers in inputs], axis=node.attributes.get_int("axis", 0))


def _reshape(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    target = as_integers(inputs[1])
    if target is None:
        return None
    if not node.attributes.get_int("allowzero", 0):
        target = [inputs[0].shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return inputs[0].reshape(target)


def _unsqueeze(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    axes = as_integers(inputs[1]) if len(inputs) > 1 else None
    return None if axes is None else np.expand_dims(inputs[0], tuple(axes))


def _squeeze(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    axes = (
        as_integers(inputs[1]) if len(inputs) > 1 else [axis for axis, size in enumerate(inputs[0].shape) if size == 1]
    )
    return None if axes is None else np.squeeze(inputs[0], tuple(axes))


def _transpose(node: ir.Node, inputs: list[Numbers]) -> Numbers:
    perm = node.attributes.get("perm")
    return np.transpose(inputs[0], list(perm.as_ints()) if perm is not None else None)


def _expand(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    target = as_integers(inputs[1])
    if target is None or np.prod(target) > MAX_ENTRIES:
        return None
    return np.broadcast_to(inputs[0], np.broadcast_shapes(inputs[0].shape, tuple(target)))


def _tile(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    repeats = as_integers(inputs[1])
    return None if repeats is None or np.prod(repeats) > MAX_ENTRIES else np.tile(inputs[0], repeats)


def _cast(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    dtype = ir.DataType(node.attributes["to"].as_int())
    if dtype in INTEGERS[:2]:
        return each(lambda entry: entry if isinstance(entry, Length) else Length(int(entry)), inputs[0])
    if dtype == ir.DataType.BOOL:
        return each(_truth, inputs[0])
    if not dtype.is_floating_point():
        return None
    return each(lambda entry: _float(entry, dtype), inputs[0])


def _truth(entry: object) -> bool | None:
    number = entry.number if isinstance(entry, Length) else entry
    return None if number is None else bool(number)


def _float(entry: object, dtype: ir.DataType) -> object:
    """Return an entry as a float of the type; a symbolic length is kept, so that T / T is known to be 1."""
    number = entry.number if isinstance(entry, Length) else entry
    return entry if number is None else dtype.numpy().type(number)


def _constant_of_shape(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
    shape, fill = as_integers(inputs[0]), node.attributes.get("value")
    if shape is None or np.prod(shape) > MAX_ENTRIES or fill is None or fill.as_tensor().dtype not in INTEGERS[:2]:
        return None
    count = int(np.prod(shape))
    return array_of([Length(int(fill.as_tensor().numpy().reshape(-1)[0]))] * count, tuple(shape))


def _where(node: ir.Node, inputs: list[Numbers]) -> Numbers:
    return each(lambda chosen, first, second: first if chosen else second, *inputs)


def _reduced(function: Callable[[Length, Length], Length]) -> Callable[[ir.Node, list[Numbers]], Numbers | None]:
    """Return the rule for a reduction over all axes, from its function of two lengths."""

    def rule(node: ir.Node, inputs: list[Numbers]) -> Numbers | None:
        entries = list(inputs[0].reshape(-1))
        if len(inputs) > 1 or "axes" in node.attributes or not all(isinstance(entry, Length) for entry in entries):
            return None
        shape = (1,) * inputs[0].ndim if node.attributes.get_int("keepdims", 1) else ()
        return array_of([functools.reduce(function, entries)], shape) if entries else None

    return rule


def _arithmetic(lengths: Callable, floats: Callable) -> Callable[[ir.Node, list[Numbers]], Numbers]:
    """Return the rule for an elementwise op on lengths or on floats; mixed operands are unknown."""

    def entry_rule(dtype: ir.DataType | None, *entries: object) -> object:
        plain = [entry for entry in entries if not isinstance(entry, Length)]
        if not plain and (dtype is None or not dtype.is_floating_point()):
            return lengths(*entries)
        if len(plain) == len(entries):
            return floats(*entries)
        # The only float result that is known for symbolic lengths is T / T = 1.
        same = floats is operator.truediv and not plain and entries[0] == entries[1]
        return dtype.numpy().type(1) if same and dtype is not None else None

    def rule(node: ir.Node, inputs: list[Numbers]) -> Numbers:
        return each(functools.partial(entry_rule, node.outputs[0].dtype), *inputs)

    return rule


def _ratio(first: Length, second: Length) -> Length | None:
    if first.number is not None and second.number:
        return Length(int(first.number / second.number))  # towards zero, as ONNX divides integers
    return first.over(second)


def _modulo(first: Length, second: Length) -> Length | None:
    return Length(first.number % second.number) if first.number is not None and second.number else None


def _extreme(sign: int) -> Callable[[ir.Node, list[Numbers]], Numbers]:
    """Return the rule for Max (sign 1) or Min (-1) of lengths whose difference is a number."""

    def rule(*entries: object) -> object:
        if not all(isinstance(entry, Length) for entry in entries):
            return None
        best = entries[0]
        for entry in entries[1:]:
            difference = (entry - best).number  # type: ignore[operator]
            if difference is None:
                return None
            best = entry if sign * difference > 0 else best
        return best

    return lambda node, inputs: each(rule, *inputs)


def _compared(holds: Callable[[int], bool]) -> Callable[[ir.Node, list[Numbers]], Numbers]:
    """Return the rule for a comparison of two lengths whose difference is a number."""

    def rule(first: object, second: object) -> object:
        if not isinstance(first, Length) or not isinstance(second, Length):
            return None
        difference = (first - second).number
        return None if difference is None else holds(difference)

    return lambda node, inputs: each(rule, *inputs)


def _equal(first: object, second: object) -> bool | None:
    """Return True if two entries are equal, None if two symbolic lengths may be. A symbol is never negative."""
    if first == second:
        return True
    if not isinstance(first, Length) or not isinstance(second, Length):
        return False
    plain = (first.number, second.number)
    return False if None not in plain or any(number is not None and number < 0 for number in plain) else None


RULES: dict[str, Callable[[ir.Node, list[Numbers]], Numbers | None]] = {
    "Add": _arithmetic(lambda a, b: a + b, lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b, lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a.times(b), lambda a, b: a * b),
    "Div": _arithmetic(_ratio, operator.truediv),
    "Mod": _arithmetic(_modulo, lambda a, b: None),
    "Neg": _arithmetic(lambda a: -a, lambda a: -a),
    "Sqrt": _arithmetic(lambda a: None, np.sqrt),
    "Max": _extreme(1),
    "Min": _extreme(-1),
    "Less": _compared(lambda difference: difference < 0),
    "LessOrEqual": _compared(lambda difference: difference <= 0),
    "Greater": _compared(lambda difference: difference > 0),
    "GreaterOrEqual": _compared(lambda difference: difference >= 0),
    "Equal": lambda node, inputs: each(_equal, *inputs),
    "ReduceProd": _reduced(lambda a, b: a.times(b)),
    "ReduceSum": _reduced(lambda a, b: a + b),
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Expand": _expand,
    "Tile": _tile,
    "Identity": lambda node, inputs: inputs[0],
    "Cast": _cast,
    "ConstantOfShape": _constant_of_shape,
}
