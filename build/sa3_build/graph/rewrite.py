"""Edit a graph: replace uses, remove unused nodes and initializers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir


def type_like(value: ir.Value, like: ir.Value) -> None:
    """Give a new value the element type of `like`."""
    if like.dtype is not None:
        value.dtype = like.dtype


def replace_uses(value: ir.Value, replacement: ir.Value) -> None:
    """Make every node that reads `value` read `replacement`."""
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, replacement)


def remove_unused(model: ir.Model, matches: Callable[[ir.Node], bool]) -> None:
    """Remove the nodes that `matches` accepts and no node reads, users first."""
    for node in reversed(list(model.graph)):
        if matches(node) and not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)


def drop_unused_initializers(model: ir.Model) -> None:
    """Remove the initializers that no node reads."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(name)


def integers(model: ir.Model, name: str, numbers: Iterable[int]) -> ir.Value:
    """Return a new initializer of int64 numbers (n,)."""
    value = ir.val(name, const_value=ir.tensor(np.array(list(numbers), np.int64), name=name))
    model.graph.register_initializer(value)
    return value
