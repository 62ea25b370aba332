"""Read a graph: constants, weighted products and what a node depends on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import onnx_ir as ir

PRODUCTS = ("MatMul", "Gemm")


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer or of a Constant node's output; None for anything computed."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def weight_of(product: ir.Node) -> ir.Value | None:
    """The weight behind a MatMul or Gemm, seen through Transpose and Cast; None when both sides are data."""
    if product.op_type not in PRODUCTS:
        return None
    value = product.inputs[1]
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Cast"):
            return None
        value = node.inputs[0]
    return value


def weighted_products(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Every MatMul or Gemm with a weight, in graph order."""
    for node in model.graph:
        weight = weight_of(node)
        if weight is not None:
            yield node, weight


def ancestors(values: Iterable[ir.Value | None], stop: Callable[[ir.Node], bool] = lambda _: False) -> set[ir.Node]:
    """Every node that the values depend on, not looking behind nodes for which `stop` holds (those are included)."""
    found: set[ir.Node] = set()
    queue = [value.producer() for value in values if value is not None]
    while queue:
        node = queue.pop()
        if node is None or node in found:
            continue
        found.add(node)
        if not stop(node):
            queue.extend(value.producer() for value in node.inputs if value is not None)
    return found


def products_below(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """The nearest products below a node that read what it gives, each with the number of the input that does."""
    seen: set[ir.Node | tuple[ir.Node, int]] = set()
    queue, found = [node], []
    while queue:
        for value in queue.pop().outputs:
            for user, index in value.uses():
                is_product = user.op_type in PRODUCTS
                reader = (user, index) if is_product else user
                if reader in seen or gives_sizes(user):
                    continue
                seen.add(reader)
                if is_product:
                    found.append((user, index))
                else:
                    queue.append(user)
    return found


def users(node: ir.Node, through: Collection[str]) -> list[ir.Node]:
    """The users of a node's first output, seen through nodes of the op types `through`."""
    found: list[ir.Node] = []
    queue = [use.node for use in node.outputs[0].uses()]
    while queue:
        user = queue.pop(0)
        if user.op_type in through:
            queue.extend(use.node for use in user.outputs[0].uses())
        else:
            found.append(user)
    return found


def gives_sizes(node: ir.Node) -> bool:
    """Does this node say how large a tensor is? Behind it there is no data."""
    return node.op_type in ("Shape", "Size")


def graph_inputs_behind(model: ir.Model) -> dict[ir.Node, frozenset[str]]:
    """For every node of a sorted graph: the names of the graph inputs that it depends on through data."""
    names = {value: frozenset([str(value.name)]) for value in model.graph.inputs}
    behind: dict[ir.Node, frozenset[str]] = {}
    for node in model.graph:
        union: frozenset[str] = frozenset()
        if not gives_sizes(node):
            for value in node.inputs:
                if value is not None:
                    producer = value.producer()
                    union |= (
                        behind.get(producer, frozenset()) if producer is not None else names.get(value, frozenset())
                    )
        behind[node] = union
    return behind
