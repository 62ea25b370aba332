"""Read from a DiT graph what its engine's manifest says of it: one row only, and the rule of the null row."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sa3_build.graph import io as graph_io
from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.passes import canonicalize
from sa3_build.passes.null_row import has_null_row
from sa3_trt_core.targets import Target


def dit_facts(onnx: Path, target: Target) -> dict[str, bool]:
    """Return what a manifest says of a DiT graph beside its settings: one row only, and the rule of the null row.

    Both are false for other graphs; a DiT whose structure is not recognised is said to have no such rule.
    """
    facts = {"one_row": False, "null_row": False}
    if target.kind != "dit":
        return facts
    model = graph_io.load(onnx)
    facts["one_row"] = any(value.shape is not None and value.shape[0] == 1 for value in model.graph.inputs)
    with contextlib.suppress(GraphNotRecognised):
        canonicalize.canonicalize(model, free_batch=False)
        facts["null_row"] = has_null_row(model)
    return facts
