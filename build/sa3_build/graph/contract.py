"""Check a graph's inputs and outputs against the contract of its kind."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import CONTRACTS, GraphContract

DTYPES = {"float32": ir.DataType.FLOAT, "int64": ir.DataType.INT64, "int32": ir.DataType.INT32}


def require_contract(model: ir.Model, kind: str, source: Path) -> GraphContract:
    """Check that inputs and outputs are those of the contract, in name, type and fixed axes. Raises ToolError."""
    contract = CONTRACTS[kind]
    for values, specs, what in (
        (model.graph.inputs, contract.inputs, "input"),
        (model.graph.outputs, contract.outputs, "output"),
    ):
        by_name = {value.name: value for value in values}
        for spec in specs:
            value = by_name.pop(spec.name, None)
            if value is None:
                found = ", ".join(str(v.name) for v in values) or "none"
                raise _not_a(kind, source, f"it has no {what} {spec.name} (its {what}s: {found})")
            if value.dtype != DTYPES[spec.dtype]:
                raise _not_a(kind, source, f"{what} {spec.name} is {value.dtype}, not {spec.dtype}")
            shape = value.shape
            if shape is None or len(shape) != len(spec.dims):
                raise _not_a(kind, source, f"{what} {spec.name} has not {len(spec.dims)} axes")
            for found_dim, wanted in zip(shape, spec.dims, strict=True):
                if isinstance(wanted, int) and isinstance(found_dim, int) and found_dim != wanted:
                    raise _not_a(kind, source, f"{what} {spec.name} has an axis of {found_dim}, not {wanted}")
        if by_name:
            raise _not_a(kind, source, f"it has an unknown {what} {next(iter(by_name))}")
    return contract


def _not_a(kind: str, source: Path, why: str) -> ToolError:
    return ToolError(f"{source} is not a {kind} graph: {why}", f"give the {kind} ONNX of Stable Audio 3")
