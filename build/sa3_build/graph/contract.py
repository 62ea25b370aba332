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
                wanted_names = ", ".join(one.name for one in (contract.inputs if what == "input" else contract.outputs))
                cure = f"export it with {what}_names {wanted_names}, or give the {kind} ONNX of Stable Audio 3"
                raise _not_a(kind, source, f"it has no {what} {spec.name} (its {what}s: {found})", cure)
            if value.dtype != DTYPES[spec.dtype]:
                cure = (
                    f"export it with {spec.dtype} for {spec.name}; a Cast inside the graph may make another type of it"
                )
                raise _not_a(kind, source, f"{what} {spec.name} is {value.dtype}, not {spec.dtype}", cure)
            shape = value.shape
            if shape is None:  # nothing stated: the contract says what it is
                continue
            if len(shape) != len(spec.dims):
                raise _not_a(kind, source, f"{what} {spec.name} has not {len(spec.dims)} axes")
            for found_dim, wanted in zip(shape, spec.dims, strict=True):
                if isinstance(wanted, int) and isinstance(found_dim, int) and found_dim != wanted:
                    raise _not_a(kind, source, f"{what} {spec.name} has an axis of {found_dim}, not {wanted}")
        if by_name:
            extra = next(iter(by_name))
            cure = f"export it without the {what} {extra}: the {kind} contract has {len(contract.inputs)} inputs"
            raise _not_a(kind, source, f"it has an unknown {what} {extra}", cure)
    return contract


def _not_a(kind: str, source: Path, why: str, cure: str | None = None) -> ToolError:
    return ToolError(f"{source} is not a {kind} graph: {why}", cure or f"give the {kind} ONNX of Stable Audio 3")
