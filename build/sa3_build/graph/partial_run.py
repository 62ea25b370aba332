"""Compute single values of a graph by ONNX's reference evaluator, from known values and a length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from sa3_build.graph import query
from sa3_build.graph.errors import described
from sa3_build.graph.shape_inference import followed
from sa3_build.graph.shape_rules import Numbers
from sa3_build.graph.symbolic_dim import Length, symbol

FRAMES = symbol("L")
ROWS = 1


class NotComputable(Exception):
    """Raised when a value depends on an unknown value; the message names it."""


class PartialRun:
    """Computes values of a sorted graph for one row, stopping at values that are known.

    Sizes come from shape inference, so that no tensor is computed only for its shape.
    """

    def __init__(self, model: ir.Model) -> None:
        self.shapes = followed(model)
        self._opset = model.opset_imports.get("", 0)

    def run(self, values: Sequence[ir.Value], known: Mapping[ir.Value, np.ndarray], frames: int) -> list[np.ndarray]:
        """Return `values`, computed from `known` values and a latent of `frames` frames. Raises NotComputable."""
        nodes = self.nodes_needed_for(values, known)
        computable = {value for node in nodes for value in node.outputs}
        feeds = {str(value.name): array for value, array in known.items()}
        for value in {value for node in nodes for value in node.inputs if value is not None} | set(values):
            if value not in computable and value not in known:
                feeds[str(value.name)] = self._known(value, frames)
        unknown = [value for value in values if value in computable]
        computed = dict(zip(unknown, self._evaluated(nodes, unknown, feeds), strict=True)) if unknown else {}
        return [computed[value] if value in computed else feeds[str(value.name)] for value in values]

    def nodes_needed_for(
        self, values: Sequence[ir.Value], known: Mapping[ir.Value, np.ndarray] | None = None
    ) -> list[ir.Node]:
        """Return the nodes that compute `values` from `known` values, in order, without length arithmetic."""
        ordered: dict[ir.Node, None] = {}
        waiting: list[tuple[ir.Value | None, bool]] = [(value, False) for value in values]
        while waiting:
            value, done = waiting.pop()
            node = value.producer() if value is not None else None
            if node is None or node in ordered or (known and value in known) or self._numbers(value) is not None:
                continue
            if query.gives_sizes(node):
                raise NotComputable(f"{described(node)} returns a size that is not known")
            if done:
                ordered[node] = None
            else:
                waiting += [(value, True), *((operand, False) for operand in node.inputs)]
        return list(ordered)

    def _evaluated(
        self, nodes: list[ir.Node], values: list[ir.Value], feeds: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        used = {str(value.name) for node in nodes for value in node.inputs if value is not None}
        part = onnx.helper.make_graph(
            [ir.to_proto(node) for node in nodes], "part",
            [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
             for name, array in feeds.items() if name in used],
            [onnx.helper.make_tensor_value_info(str(value.name), onnx.TensorProto.UNDEFINED, None) for value in values],
        )  # fmt: skip
        part_model = onnx.helper.make_model(part, opset_imports=[onnx.helper.make_opsetid("", self._opset)])
        results = ReferenceEvaluator(part_model).run(
            None, {name: array for name, array in feeds.items() if name in used}
        )
        assert isinstance(results, list)
        return [np.asarray(result) for result in results]

    def _numbers(self, value: ir.Value | None) -> Numbers | None:
        """Return the entries of an integer value if all of them are known, else None."""
        numbers = self.shapes.numbers(value)
        return None if numbers is None or any(entry is None for entry in numbers.reshape(-1)) else numbers

    def _known(self, value: ir.Value, frames: int) -> np.ndarray:
        constant = query.constant_of(value)
        if constant is not None:
            return constant
        numbers = self._numbers(value)
        if numbers is None or value.dtype is None:
            raise NotComputable(f"{value.name} is not known")
        entries = [_at(entry, frames) for entry in numbers.reshape(-1)]
        return np.array(entries, value.dtype.numpy()).reshape(numbers.shape)


def _at(entry: object, frames: int) -> object:
    """Return an entry as a number for a latent of `frames` frames. Raises NotComputable."""
    if not isinstance(entry, Length):
        return entry
    number = entry.at("L", frames).at("B", ROWS).number
    if number is None:
        raise NotComputable(f"it depends on {entry}")
    return number
