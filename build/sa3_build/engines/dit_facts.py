"""Facts of a DiT graph that its engine's manifest records: fixed batch of 1, and support of guidance's null row."""

from __future__ import annotations

import contextlib
from pathlib import Path

from sa3_build.graph import io as graph_io
from sa3_build.graph.errors import GraphNotRecognised
from sa3_build.passes import canonicalize
from sa3_build.passes.null_row import has_null_row
from sa3_trt_core.targets import Target


def dit_facts(onnx: Path, target: Target) -> dict[str, bool]:
    """Return {"one_row": the DiT graph is fixed at one row, "null_row": it implements guidance's null row}.

    Both are False for other graphs; the second is False for a DiT whose structure is not recognised.
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
