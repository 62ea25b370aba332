"""Lower the plug-ins of published autoencoder graphs: in memory for a compiler, or to a file for every backend."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from sa3_build.graph import io as graph_io
from sa3_build.graph.errors import naming
from sa3_build.passes.base import run_passes
from sa3_build.passes.lower_attention import LowerAttention, plugged
from sa3_build.passes.topological_sort import SortTopologically
from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.build import build
from sa3_trt_core.errors import ToolError

__all__ = ["lower_file", "lowered", "plugged"]


def lowered(path: Path) -> bytes | None:
    """Return the graph of a file with its plug-ins lowered, weights left in the sidecar; None if it has none.

    Raises ToolError for a plug-in that is not recognised.
    """
    model = graph_io.mapped(path)
    if not plugged(model):
        return None
    _lower(model, path)
    return ir.to_proto(model).SerializeToString()


def plain_graph(path: Path) -> ir.Model:
    """Return the sorted graph of a file with its plug-ins lowered. Raises ToolError."""
    model = graph_io.load(path)
    if plugged(model):
        _lower(model, path)
    model.graph.sort()
    return model


def lower_file(source: Path, output: Path) -> int:
    """Write a graph with its plug-ins lowered, its sidecar and manifest; return the number of plug-ins.

    Returns 0 if the output is current. Raises ToolError.
    """
    inputs = {file.name: files.sha256_of(file) for file in graph_io.files_of(source)}
    with build(output, "onnx", inputs, {"lowered": LowerAttention.name}) as draft:
        if draft is None:
            return 0
        model = graph_io.load(source)
        if not plugged(model):
            raise ToolError(f"{source} contains no plug-in to lower", "use it without this step")
        if output.resolve() == source.resolve():
            raise ToolError(f"--onnx {output} is also the input", "choose another path for --onnx")
        count = _lower(model, source)
        draft.finish(graph_io.save(model, output), {"lowered": count})
    return count


def _lower(model: ir.Model, path: Path) -> int:
    with naming(path):
        return run_passes(model, [SortTopologically(), LowerAttention()])[-1].counts["lowered"]
