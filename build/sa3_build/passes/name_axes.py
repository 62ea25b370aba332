"""Rename the axes of a DiT's inputs and outputs to the contract's names, by position."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.passes.base import PassResult
from sa3_trt_core.shapes import CONTRACTS, GraphContract, TensorSpec

LENGTH, BATCH = "L", "B"


class NameAxes:
    """Rename every symbolic axis to the contract's name; a fixed batch axis of 1 is left to `FreeBatch`.

    Raises GraphNotRecognised for a length that was fixed at export, and for a fixed batch above 1.
    """

    name = "axes"

    def __init__(self, kind: str = "dit") -> None:
        self._contract: GraphContract = CONTRACTS[kind]

    def requires(self, model: ir.Model) -> None:
        for value, spec in self._pairs(model):
            for axis, (axis_size, expected) in enumerate(zip(_axes(value, len(spec.dims)), spec.dims, strict=True)):
                if expected == LENGTH and isinstance(axis_size, int):
                    raise GraphNotRecognised(
                        f"{value.name} has a fixed length of {axis_size} frames",
                        "export it with a dynamic length: axis 2 of x, local_add_cond and velocity",
                    )
                if expected == BATCH and isinstance(axis_size, int) and axis_size != 1:
                    raise GraphNotRecognised(
                        f"{value.name} has a fixed batch of {axis_size} rows",
                        "export it for one row, or with axis 0 dynamic",
                    )
                if isinstance(expected, int) and isinstance(axis_size, int) and expected != axis_size:
                    raise GraphNotRecognised(f"axis {axis} of {value.name} is {axis_size}, expected {expected}")

    def call(self, model: ir.Model) -> PassResult:
        fixed = any(_axes(value, 1)[0] == 1 for value in model.graph.inputs)
        renamed, names = 0, defaultdict(set)
        for value, spec in self._pairs(model):
            axes = []
            for axis_name, expected in zip(_axes(value, len(spec.dims)), spec.dims, strict=True):
                # If one input has a fixed batch of 1, the graph has, whatever the names of the other inputs' axes.
                stated = 1 if expected == BATCH and fixed else expected
                renamed += axis_name != stated
                if isinstance(axis_name, str):
                    names[axis_name].add(stated)
                axes.append(stated)
            if tuple(axes) != _axes(value, len(axes)):
                value.shape = ir.Shape(axes)
        if renamed:
            _rename_inside(model, {name: min(axis_name) for name, axis_name in names.items() if len(axis_name) == 1})
        return PassResult(self.name, {"named": renamed})

    def ensures(self, model: ir.Model) -> None:
        for value, spec in self._pairs(model):
            expected_axes = tuple(1 if expected == BATCH and axis == 1 else expected
                          for axis, expected in zip(_axes(value, len(spec.dims)), spec.dims, strict=True))  # fmt: skip
            assert _axes(value) == expected_axes, f"{value.name} has axes {_axes(value)}"

    def _pairs(self, model: ir.Model) -> list[tuple[ir.Value, TensorSpec]]:
        """Return the inputs and outputs with their specification in the contract."""
        specs = {spec.name: spec for spec in (*self._contract.inputs, *self._contract.outputs)}
        values = (*model.graph.inputs, *model.graph.outputs)
        return [(value, specs[str(value.name)]) for value in values if value.name in specs]


def _axes(value: ir.Value, rank: int = 0) -> tuple[int | str | None, ...]:
    """Return the declared axes; None for an unnamed one, and `rank` times None if the shape is undeclared."""
    if value.shape is None:
        return (None,) * rank
    return tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)


def _rename_inside(model: ir.Model, names: dict[str, int | str]) -> None:
    """Apply the renames to shapes inside the graph, and clear axis names that only they use."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                axes = [axis if isinstance(axis, int) else names.get(str(axis.value)) for axis in value.shape]
                value.shape = ir.Shape(axes)
