"""Query a graph: constants, weights of linear layers, dependencies of nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

import numpy as np
import onnx_ir as ir

GEMM_OPS = ("MatMul", "Gemm")


def constant_of(value: ir.Value | None) -> np.ndarray | None:
    """Return the array of an initializer or a Constant node's output; None for a computed value."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def weight_initializer(linear: ir.Node) -> ir.Value | None:
    """Return the weight initializer of a MatMul or Gemm, through Transpose and Cast; None when both sides are data."""
    if linear.op_type not in GEMM_OPS:
        return None
    value = linear.inputs[1]
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Cast"):
            return None
        value = node.inputs[0]
    return value


def linear_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield every MatMul or Gemm with a weight and that weight, in graph order."""
    for node in model.graph:
        weight = weight_initializer(node)
        if weight is not None:
            yield node, weight


def ancestors(values: Iterable[ir.Value | None], stop: Callable[[ir.Node], bool] = lambda _: False) -> set[ir.Node]:
    """Return every node that the values depend on.

    The search does not pass nodes for which `stop` returns True; these are included.
    """
    visited: set[ir.Node] = set()
    queue = [value.producer() for value in values if value is not None]
    while queue:
        node = queue.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if not stop(node):
            queue.extend(value.producer() for value in node.inputs if value is not None)
    return visited


def gemms_below(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """Return the nearest MatMul and Gemm nodes downstream of a node, each with the index of the input it feeds."""
    seen: set[ir.Node | tuple[ir.Node, int]] = set()
    queue, gemms = [node], []
    while queue:
        for value in queue.pop().outputs:
            for user, index in value.uses():
                is_gemm = user.op_type in GEMM_OPS
                reader = (user, index) if is_gemm else user
                if reader in seen or gives_sizes(user):
                    continue
                seen.add(reader)
                if is_gemm:
                    gemms.append((user, index))
                else:
                    queue.append(user)
    return gemms


def users(node: ir.Node, through: Collection[str]) -> list[ir.Node]:
    """Return the users of a node's first output, skipping nodes of the op types `through`."""
    result: list[ir.Node] = []
    queue = [use.node for use in node.outputs[0].uses()]
    while queue:
        user = queue.pop(0)
        if user.op_type in through:
            queue.extend(use.node for use in user.outputs[0].uses())
        else:
            result.append(user)
    return result


def gives_sizes(node: ir.Node) -> bool:
    """Return True for Shape and Size nodes: their output depends on no data."""
    return node.op_type in ("Shape", "Size")


def input_dependencies(model: ir.Model) -> dict[ir.Node, frozenset[str]]:
    """Return, for every node of a sorted graph, the names of the graph inputs that it depends on through data."""
    names = {value: frozenset([str(value.name)]) for value in model.graph.inputs}
    dependencies: dict[ir.Node, frozenset[str]] = {}
    for node in model.graph:
        union: frozenset[str] = frozenset()
        if not gives_sizes(node):
            for value in node.inputs:
                if value is not None:
                    producer = value.producer()
                    union |= (
                        dependencies.get(producer, frozenset())
                        if producer is not None
                        else names.get(value, frozenset())
                    )
        dependencies[node] = union
    return dependencies
