"""Check a graph's inputs and outputs against the contract of its kind."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import CONTRACTS, GraphContract

DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "int32": ir.DataType.INT32}


def require_contract(model: ir.Model, kind: str, source: Path) -> GraphContract:
    """Return the contract of `kind` after checking a graph's inputs and outputs against it.

    Compares names, element types and fixed axes. Raises ToolError at the first difference.
    """
    contract = CONTRACTS[kind]
    for values, specs, what in (
        (model.graph.inputs, contract.inputs, "input"),
        (model.graph.outputs, contract.outputs, "output"),
    ):
        values_by_name = {value.name: value for value in values}
        for spec in specs:
            value = values_by_name.pop(spec.name, None)
            if value is None:
                present = ", ".join(str(v.name) for v in values) or "none"
                required = ", ".join(entry.name for entry in specs)
                hint = f"export it with {what}_names {required}, or give the {kind} ONNX of Stable Audio 3"
                raise _not_a(kind, source, f"it has no {what} {spec.name} (its {what}s: {present})", hint)
            if value.dtype != DTYPES[spec.dtype]:
                hint = f"export it with {spec.dtype} for {spec.name} and cast inside the graph if needed"
                raise _not_a(kind, source, f"{what} {spec.name} is {value.dtype}, expected {spec.dtype}", hint)
            shape = value.shape
            if shape is None:  # not stated: the contract's shape applies
                continue
            if len(shape) != len(spec.dims):
                raise _not_a(kind, source, f"{what} {spec.name} has {len(shape)} axes, expected {len(spec.dims)}")
            for axis, expected in zip(shape, spec.dims, strict=True):
                if isinstance(expected, int) and isinstance(axis, int) and axis != expected:
                    raise _not_a(kind, source, f"{what} {spec.name} has an axis of {axis}, expected {expected}")
        if values_by_name:
            extra_name = next(iter(values_by_name))
            hint = f"export it without the {what} {extra_name}: the {kind} contract has {len(contract.inputs)} inputs"
            raise _not_a(kind, source, f"it has an unknown {what} {extra_name}", hint)
    return contract


def _not_a(kind: str, source: Path, problem: str, hint: str | None = None) -> ToolError:
    return ToolError(f"{source} is not a {kind} graph: {problem}", hint or f"give the {kind} ONNX of Stable Audio 3")
