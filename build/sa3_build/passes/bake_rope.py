"""Replace the rotary table by a constant: cos and sin of every position, sliced to the length at run time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sa3_build.graph import query
from sa3_build.graph.errors import described
from sa3_build.graph.partial_run import FRAMES, NotComputable, PartialRun
from sa3_build.graph.rewrite import drop_unused_initializers, integers, replace_uses, type_like
from sa3_build.graph.shape_inference import Shapes
from sa3_build.graph.symbolic_dim import Length
from sa3_build.passes.base import Pass, PassResult
from sa3_trt_core.shapes import MAX_FRAMES

TRIG = {"Cos": np.cos, "Sin": np.sin}
FEW_FRAMES = 5  # a shorter table must equal the first rows of the longer one
MAX_TOKENS = 4096  # memory tokens before the latent frames


class NotMatched(Exception):
    """Raised when a pattern does not match; the message is the reason."""


class BakeRope(Pass):
    """Replace Cos and Sin of a rotary angle by a slice 0..T of a constant table; T stays a value of the graph.

    Angles are computed as in the graph, op by op in its own types, and their cosines in float64: the table equals the
    graph's up to fp32 rounding. All angles that depend on no data are baked, or none of them.
    """

    name = "bake-rope"

    def call(self, model: ir.Model) -> PassResult:
        dependencies = query.input_dependencies(model)
        trig = [node for node in model.graph if node.op_type in TRIG and not dependencies[node]]
        before = len(model.graph)
        tables: list[tuple[np.ndarray, ir.Value]] = []
        try:
            angles = _Angles(model)
            baked = [(node, *angles.table(node)) for node in trig]
        except (NotMatched, NotComputable) as reason:
            return PassResult(self.name, {"baked": 0, "not_matched": len(trig)}, (str(reason),))
        starts: dict[tuple[int, Length], ir.Value] = {}
        for node, table, length, limit in baked:
            index = _index_of(tables, table, model)
            if (index, length) not in starts:
                starts[index, length] = _sliced(model, node, tables[index][1], limit)
            replace_uses(node.outputs[0], starts[index, length])
        if trig:
            RemoveUnusedNodesPass()(model)
            drop_unused_initializers(model)
        counts = {"baked": len(trig), "tables": len(tables), "nodes_removed": before - len(model.graph)}
        return PassResult(self.name, counts, () if trig else ("no Cos or Sin of a position",))


class _Angles:
    """Evaluator of the inputs of Cos and Sin nodes, for chosen latent lengths."""

    def __init__(self, model: ir.Model) -> None:
        self._partial = PartialRun(model)
        self._shapes = self._partial.shapes
        self._done: dict[tuple[ir.Value, int], np.ndarray] = {}

    def table(self, trig: ir.Node) -> tuple[np.ndarray, Length, ir.Value]:
        """Return the table of one Cos or Sin for MAX_FRAMES frames, its length and the value of that length.

        The length is L plus memory tokens, the value an integer of the graph. Raises NotMatched when the angle is not a
        table with one row per position.
        """
        angle = trig.inputs[0]
        assert angle is not None
        nodes = self._partial.nodes_needed_for([angle])
        limits = {self._limit(node) for node in nodes if node.op_type == "Range"}
        if len(limits) != 1:
            raise NotMatched(f"{described(trig)} depends on {len(limits)} Range nodes")
        length, limit = limits.pop()
        short, longest = (self._evaluated(angle, frames) for frames in (FEW_FRAMES, MAX_FRAMES))
        sizes = (length.constant + FEW_FRAMES, length.constant + MAX_FRAMES)
        if (len(short), len(longest)) != sizes or not np.array_equal(short, longest[: len(short)]):
            raise NotMatched(f"{described(trig)} is not a table with one row per position")
        table = TRIG[trig.op_type](longest.astype(np.float64))
        return table.astype(np.float32), length, limit

    def _limit(self, counter: ir.Node) -> tuple[Length, ir.Value]:
        """Return the end of a Range (L plus memory tokens) as a length and as an integer value. Raises NotMatched."""
        value = counter.inputs[1]
        while value is not None and (producer := value.producer()) is not None and producer.op_type == "Cast":
            value = producer.inputs[0]
        numbers = self._shapes.numbers(value)
        length = numbers.reshape(-1)[0] if numbers is not None and numbers.size == 1 else None
        start, step = (_single(self._shapes, counter.inputs[index]) for index in (0, 2))
        if value is None or not isinstance(length, Length) or (start, step) != (0.0, 1.0):
            raise NotMatched(f"{described(counter)} does not count 0, 1, ... up to a known length")
        if length != FRAMES + length.constant or not 0 <= length.constant <= MAX_TOKENS:
            raise NotMatched(f"{described(counter)} counts to {length} instead of the latent length plus memory tokens")
        return length, value

    def _evaluated(self, angle: ir.Value, frames: int) -> np.ndarray:
        if (angle, frames) not in self._done:
            (self._done[angle, frames],) = self._partial.run([angle], {}, frames)
        return self._done[angle, frames]


def _single(shapes: Shapes, value: ir.Value | None) -> float | None:
    numbers = shapes.numbers(value)
    entry = numbers.reshape(-1)[0] if numbers is not None and numbers.size == 1 else None
    plain = entry.number if isinstance(entry, Length) else entry
    return None if plain is None else float(plain)


def _index_of(tables: list[tuple[np.ndarray, ir.Value]], table: np.ndarray, model: ir.Model) -> int:
    """Return the index of a table among those already stored; a new one becomes an initializer."""
    for index, (known, _) in enumerate(tables):
        if known.shape == table.shape and np.array_equal(known, table):
            return index
    name = f"rotary_table_{len(tables)}"
    value = ir.val(name, const_value=ir.tensor(table, name=name))
    model.graph.register_initializer(value)
    tables.append((table, value))
    return len(tables) - 1


def _sliced(model: ir.Model, node: ir.Node, table: ir.Value, limit: ir.Value) -> ir.Value:
    name = f"{table.name}_{node.outputs[0].name}"
    length = ir.node("Reshape", [limit, integers(model, f"{name}_flat", [-1])], name=f"{name}_length")
    axes = [integers(model, f"{name}_{role}", [0]) for role in ("from", "axis")]
    rows = ir.node("Slice", [table, axes[0], length.outputs[0], axes[1]], name=f"{name}_rows")
    length.outputs[0].shape, rows.outputs[0].shape = ir.Shape([1]), node.outputs[0].shape
    for added, like in ((length, limit), (rows, node.outputs[0])):
        added.outputs[0].name = f"{added.name}_value"
        type_like(added.outputs[0], like)
    model.graph.insert_before(node, [length, rows])
    return rows.outputs[0]
