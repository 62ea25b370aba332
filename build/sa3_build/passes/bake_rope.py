"""Make the rotary table a constant: cos and sin of every position there can be, read up to the length of the run."""

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
FEW_FRAMES = 5  # a table of another length must begin with the same rows
MOST_TOKENS = 4096  # in front of the latent; more would be no memory tokens


class Left(Exception):
    """Why a place is left as it is."""


class BakeRope(Pass):
    """Replace Cos and Sin of a rotary angle by a slice 0..T of a constant table; T stays a value of the graph.

    Angles are computed as the graph does, step by step in its own types, and their cosines in float64: the table is
    the graph's own to a rounding of fp32. Every angle that depends on no data is baked, or none is.
    """

    name = "bake-rope"

    def call(self, model: ir.Model) -> PassResult:
        behind = query.graph_inputs_behind(model)
        trig = [node for node in model.graph if node.op_type in TRIG and not behind[node]]
        before = len(model.graph)
        tables: list[tuple[np.ndarray, ir.Value]] = []
        try:
            angles = _Angles(model)
            found = [(node, *angles.table(node)) for node in trig]
        except (Left, NotComputable) as why:
            return PassResult(self.name, {"baked": 0, "left": len(trig)}, (str(why),))
        starts: dict[tuple[int, Length], ir.Value] = {}
        for node, table, length, limit in found:
            index = _index_of(tables, table, model)
            if (index, length) not in starts:
                starts[index, length] = _sliced(model, node, tables[index][1], limit)
            replace_uses(node.outputs[0], starts[index, length])
        if trig:
            RemoveUnusedNodesPass()(model)
            drop_unused_initializers(model)
        counts = {"baked": len(trig), "tables": len(tables), "nodes removed": before - len(model.graph)}
        return PassResult(self.name, counts, () if trig else ("no Cos or Sin of a position was found",))


class _Angles:
    """Evaluates what stands behind a Cos or Sin, at lengths of our choosing."""

    def __init__(self, model: ir.Model) -> None:
        self._partial = PartialRun(model)
        self._shapes = self._partial.shapes
        self._done: dict[tuple[ir.Value, int], np.ndarray] = {}

    def table(self, trig: ir.Node) -> tuple[np.ndarray, Length, ir.Value]:
        """The table of one Cos or Sin for the most frames, its length at run time, and the value that holds that."""
        angle = trig.inputs[0]
        assert angle is not None
        nodes = self._partial.nodes_behind([angle])
        limits = {self._limit(node) for node in nodes if node.op_type == "Range"}
        if len(limits) != 1:
            raise Left(f"{described(trig)} depends on {len(limits)} Range nodes")
        length, limit = limits.pop()
        few, most = (self._evaluated(angle, frames) for frames in (FEW_FRAMES, MAX_FRAMES))
        sizes = (length.constant + FEW_FRAMES, length.constant + MAX_FRAMES)
        if (len(few), len(most)) != sizes or not np.array_equal(few, most[: len(few)]):
            raise Left(f"{described(trig)} is no table with one row a position")
        table = TRIG[trig.op_type](most.astype(np.float64))
        return table.astype(np.float32), length, limit

    def _limit(self, counter: ir.Node) -> tuple[Length, ir.Value]:
        """How far a Range counts: L and the memory tokens, as an integer value."""
        value = counter.inputs[1]
        while value is not None and (maker := value.producer()) is not None and maker.op_type == "Cast":
            value = maker.inputs[0]
        numbers = self._shapes.numbers(value)
        length = numbers.reshape(-1)[0] if numbers is not None and numbers.size == 1 else None
        start, step = (_single(self._shapes, counter.inputs[place]) for place in (0, 2))
        if value is None or not isinstance(length, Length) or (start, step) != (0.0, 1.0):
            raise Left(f"{described(counter)} does not count 0, 1, ... to a length that is known")
        if length != FRAMES + length.constant or not 0 <= length.constant <= MOST_TOKENS:
            raise Left(f"{described(counter)} counts to {length}, not to the frames and some tokens")
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
    """Which table this is; a new one becomes an initializer."""
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
    axes = [integers(model, f"{name}_{which}", [0]) for which in ("from", "axis")]
    rows = ir.node("Slice", [table, axes[0], length.outputs[0], axes[1]], name=f"{name}_rows")
    length.outputs[0].shape, rows.outputs[0].shape = ir.Shape([1]), node.outputs[0].shape
    for one, like in ((length, limit), (rows, node.outputs[0])):
        one.outputs[0].name = f"{one.name}_value"
        type_like(one.outputs[0], like)
    model.graph.insert_before(node, [length, rows])
    return rows.outputs[0]
