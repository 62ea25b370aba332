"""Write the check rows beside graphs and engines: computed by ONNX Runtime for a graph, copied for an engine."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from sa3_build.graph import io as graph_io
from sa3_trt_core.artifacts import check_rows, files
from sa3_trt_core.artifacts.check_rows import check_path
from sa3_trt_core.engines import self_check
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import Target


def digests_of(onnx: Path) -> list[str]:
    """Return the sha256 of a graph and of each of its sidecars."""
    return [files.sha256_of(file) for file in graph_io.files_of(onnx)]


def write_check_rows(onnx: Path, kind: str, precision: str, out: Path | None = None) -> Path:
    """Run a graph on the check rows of its contract and write them beside it, or beside `out`.

    Raises ToolError for a graph that ONNX Runtime does not run, GateError for one whose output is not finite.
    """
    path = check_path(out or onnx)
    with OnnxRuntimeEngine(onnx, low_memory=True) as engine:
        checks = self_check.make_checks(kind, precision, engine.run, digests_of(onnx))
    check_rows.write(path, checks)
    return path


def engine_check_rows(onnx: Path, target: Target, engine: Path) -> list[Path]:
    """Write the check rows of a graph beside the engine built from it, computing them if the graph has none.

    Returns their path in a list, which is empty for a graph that ONNX Runtime does not run. Raises ToolError when the
    graph's rows are damaged.
    """
    path, graph_rows = check_path(engine), check_path(onnx)
    path.unlink(missing_ok=True)
    if graph_rows.is_file() and list(check_rows.read(graph_rows).graph) == sorted(digests_of(onnx)):
        with files.atomic_path(path) as temporary:
            shutil.copyfile(graph_rows, temporary)
        return [path]
    try:
        return [write_check_rows(onnx, target.kind, target.precision, engine)]
    except ToolError as error:
        print(f"no check rows for {target.name}: {error.message}", file=sys.stderr)
        return []


def place_check_rows(rows: Path, onnx: Path) -> Path:
    """Write check rows, computed before the graph was moved into place, beside it with its final digests."""
    checks = check_rows.read(rows)
    check_rows.write(check_path(onnx), replace(checks, graph=tuple(sorted(digests_of(onnx)))))
    return check_path(onnx)
