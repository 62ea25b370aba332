"""Give the axes of a DiT's inputs and outputs the contract's names, by position: exporters have any name, or none."""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.passes.base import PassResult
from sa3_trt_core.shapes import CONTRACTS, GraphContract, TensorSpec

LENGTH, BATCH = "L", "B"


class NameAxes:
    """Name every axis that is not a number as the contract does; a batch axis of 1 is left for `FreeBatch`.

    Raises GraphNotRecognised for a length that was fixed at export time, and for several rows.
    """

    name = "axes"

    def __init__(self, kind: str = "dit") -> None:
        self._contract: GraphContract = CONTRACTS[kind]

    def requires(self, model: ir.Model) -> None:
        for value, spec in self._pairs(model):
            for axis, (found, wanted) in enumerate(zip(_axes(value, len(spec.dims)), spec.dims, strict=True)):
                if wanted == LENGTH and isinstance(found, int):
                    raise GraphNotRecognised(
                        f"{value.name} is fixed at {found} frames",
                        "export it with a dynamic length: axis 2 of x, local_add_cond and velocity",
                    )
                if wanted == BATCH and isinstance(found, int) and found != 1:
                    raise GraphNotRecognised(
                        f"{value.name} is fixed at {found} rows", "export it for one row, or with axis 0 dynamic"
                    )
                if isinstance(wanted, int) and isinstance(found, int) and wanted != found:
                    raise GraphNotRecognised(f"axis {axis} of {value.name} is {found}, not {wanted}")

    def call(self, model: ir.Model) -> PassResult:
        fixed = any(_axes(value, 1)[0] == 1 for value in model.graph.inputs)
        renamed, old = 0, defaultdict(set)
        for value, spec in self._pairs(model):
            axes = []
            for found, wanted in zip(_axes(value, len(spec.dims)), spec.dims, strict=True):
                # One input of one row makes the graph one of one row, whatever the others' axes are called.
                stated = 1 if wanted == BATCH and fixed else wanted
                renamed += found != stated
                if isinstance(found, str):
                    old[found].add(stated)
                axes.append(stated)
            if tuple(axes) != _axes(value, len(axes)):
                value.shape = ir.Shape(axes)
        if renamed:
            _rename_inside(model, {name: min(found) for name, found in old.items() if len(found) == 1})
        return PassResult(self.name, {"named": renamed})

    def ensures(self, model: ir.Model) -> None:
        for value, spec in self._pairs(model):
            found = tuple(1 if wanted == BATCH and axis == 1 else wanted
                          for axis, wanted in zip(_axes(value, len(spec.dims)), spec.dims, strict=True))  # fmt: skip
            assert _axes(value) == found, f"{value.name} has axes {_axes(value)}"

    def _pairs(self, model: ir.Model) -> list[tuple[ir.Value, TensorSpec]]:
        """Inputs and outputs with what the contract says of them."""
        specs = {spec.name: spec for spec in (*self._contract.inputs, *self._contract.outputs)}
        values = (*model.graph.inputs, *model.graph.outputs)
        return [(value, specs[str(value.name)]) for value in values if value.name in specs]


def _axes(value: ir.Value, rank: int = 0) -> tuple[int | str | None, ...]:
    """The axes as stated; None for one without a name, and for all `rank` of them where nothing is stated."""
    if value.shape is None:
        return (None,) * rank
    return tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape)


def _rename_inside(model: ir.Model, names: dict[str, int | str]) -> None:
    """Let the shapes noted inside the graph say the same, and nothing where an axis has a name of theirs alone."""
    for node in model.graph:
        for value in node.outputs:
            if value.shape is not None and not value.is_graph_output():
                axes = [axis if isinstance(axis, int) else names.get(str(axis.value)) for axis in value.shape]
                value.shape = ir.Shape(axes)
