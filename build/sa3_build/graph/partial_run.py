"""Compute single values of a graph by ONNX's reference evaluator, from values that are given and a length."""

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
    """A value depends on something that is neither given nor known; the message names it."""


class PartialRun:
    """Computes values of a sorted graph for one row, without what lies behind the values that are given.

    Sizes are known from the shapes, so that no data is computed only to be measured.
    """

    def __init__(self, model: ir.Model) -> None:
        self.shapes = followed(model)
        self._opset = model.opset_imports.get("", 0)

    def run(self, wanted: Sequence[ir.Value], given: Mapping[ir.Value, np.ndarray], frames: int) -> list[np.ndarray]:
        """The values `wanted`, from `given` ones and a latent of so many frames. Raises NotComputable."""
        nodes = self.nodes_behind(wanted, given)
        made = {value for node in nodes for value in node.outputs}
        feeds = {str(value.name): array for value, array in given.items()}
        for value in {value for node in nodes for value in node.inputs if value is not None} | set(wanted):
            if value not in made and value not in given:
                feeds[str(value.name)] = self._known(value, frames)
        computed = [value for value in wanted if value in made]
        found = dict(zip(computed, self._evaluated(nodes, computed, feeds), strict=True)) if computed else {}
        return [found[value] if value in found else feeds[str(value.name)] for value in wanted]

    def nodes_behind(
        self, wanted: Sequence[ir.Value], given: Mapping[ir.Value, np.ndarray] | None = None
    ) -> list[ir.Node]:
        """The nodes that compute values, in order, but for what is given and for the arithmetic of lengths."""
        ordered: dict[ir.Node, None] = {}
        waiting: list[tuple[ir.Value | None, bool]] = [(value, False) for value in wanted]
        while waiting:
            value, done = waiting.pop()
            node = value.producer() if value is not None else None
            if node is None or node in ordered or (given and value in given) or self._numbers(value) is not None:
                continue
            if query.gives_sizes(node):
                raise NotComputable(f"{described(node)} gives a size that is not known")
            if done:
                ordered[node] = None
            else:
                waiting += [(value, True), *((operand, False) for operand in node.inputs)]
        return list(ordered)

    def _evaluated(
        self, nodes: list[ir.Node], wanted: list[ir.Value], feeds: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        used = {str(value.name) for node in nodes for value in node.inputs if value is not None}
        part = onnx.helper.make_graph(
            [ir.to_proto(node) for node in nodes], "part",
            [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
             for name, array in feeds.items() if name in used],
            [onnx.helper.make_tensor_value_info(str(value.name), onnx.TensorProto.UNDEFINED, None) for value in wanted],
        )  # fmt: skip
        whole = onnx.helper.make_model(part, opset_imports=[onnx.helper.make_opsetid("", self._opset)])
        results = ReferenceEvaluator(whole).run(None, {name: array for name, array in feeds.items() if name in used})
        assert isinstance(results, list)
        return [np.asarray(result) for result in results]

    def _numbers(self, value: ir.Value | None) -> Numbers | None:
        """The entries of a value when every one is known."""
        numbers = self.shapes.numbers(value)
        return None if numbers is None or any(entry is None for entry in numbers.reshape(-1)) else numbers

    def _known(self, value: ir.Value, frames: int) -> np.ndarray:
        constant = query.constant_of(value)
        if constant is not None:
            return constant
        numbers = self._numbers(value)
        if numbers is None or value.dtype is None:
            raise NotComputable(f"{value.name} is neither given nor known")
        entries = [_at(entry, frames) for entry in numbers.reshape(-1)]
        return np.array(entries, value.dtype.numpy()).reshape(numbers.shape)


def _at(entry: object, frames: int) -> object:
    """An entry as a number, when the latent has so many frames."""
    if not isinstance(entry, Length):
        return entry
    number = entry.at("L", frames).at("B", ROWS).number
    if number is None:
        raise NotComputable(f"it depends on {entry}")
    return number
