"""Registry of backends, best first, and selection of one per target. Register a new backend in _BEST_FIRST."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from sa3_trt_core.engines import onnxruntime, tensorrt, tensorrt_rtx, torch
from sa3_trt_core.engines.backend import EVERYTHING, Backend
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.targets import Target

if TYPE_CHECKING:
    from sa3_trt_core.engines import self_check
    from sa3_trt_core.engines.base import GraphEngine

AUTO = "auto"
_BEST_FIRST = (
    tensorrt.BACKEND,
    tensorrt_rtx.BACKEND,
    torch.BACKEND,
    onnxruntime.BACKEND,
)
BACKENDS: Mapping[str, Backend] = MappingProxyType({backend.name: backend for backend in _BEST_FIRST})
CHOICES = (AUTO, *BACKENDS)
BUILT = {name: backend for name, backend in BACKENDS.items() if backend.suffix is not None}
DIRECT = next(backend for backend in BACKENDS.values() if backend.suffix is None)  # runs any ONNX as it is
AUTO_HELP = (
    f"{AUTO} takes a built engine if this machine can run it "
    f"({', then '.join(backend.label for backend in BUILT.values())}), else {DIRECT.label}"
)


def find_backend(name: str) -> Backend:
    """Return the record of that name. Raises ToolError for an unknown one."""
    if name not in BACKENDS:
        raise ToolError(f"unknown backend {name!r}", f"known: {', '.join(CHOICES)}")
    return BACKENDS[name]


def backend_of_file(path: Path) -> Backend | None:
    """Return the backend whose engine a file is, by its suffix; None for any other file."""
    return next((backend for backend in BUILT.values() if backend.suffix == path.suffix), None)


def default_build() -> Backend:
    """Return the default backend of builds: the first installed one of those that run every graph."""
    whole = [backend for backend in BUILT.values() if backend.runs == EVERYTHING]
    return next((backend for backend in whole if backend.available()), whole[-1])


def pick_backend(name: str, target: Target, models_dir: Path) -> str:
    """Return the backend of a target: `name`, or for "auto" the best one with an engine that this machine can run.

    DIRECT runs the targets that a backend does not cover (Backend.leaves). Raises ToolError for an unknown backend, an
    unsupported precision, or a missing package.
    """
    if name == AUTO:
        return next(backend.name for backend in BACKENDS.values() if backend.is_ready(target, models_dir))
    backend = find_backend(name)
    if backend.suffix is not None and backend.leaves(target, models_dir):
        backend = DIRECT
    backend.require_precision(target)
    backend.require_available()
    return backend.name


def source_path(target: Target, backend: str, source: ModelSource) -> Path:
    """Return the file that a backend loads: the engine of this machine's GPU, or the ONNX (downloaded if missing)."""
    record = BACKENDS[backend]
    if record.suffix is None:
        return resolve.resolve_onnx(target, source)
    arch = record.arch_here()
    if arch is None:
        raise ToolError(f"{backend} needs an NVIDIA GPU; no GPU is visible", f"choose `backend={DIRECT.name}`")
    path = record.engine_path(source.models_dir, arch, target)
    if not path.is_file():
        raise ToolError(f"no engine {path}", f"build it: {record.rebuild_command(target.name, arch)}")
    return path


def open_engine(target: Target, backend: str, source: ModelSource, path: Path | None = None) -> GraphEngine:
    """Load a target with a backend from `pick_backend`. `path` is its file (default: that of `source_path`).

    On its first use on this machine an engine is run on the check rows of its graph. Raises ToolError; GateError if its
    outputs differ from the graph's.
    """
    return _checked(target, backend, source, path or source_path(target, backend, source))[0]


def check_engine(target: Target, backend: str, source: ModelSource) -> list[self_check.CheckOutcome]:
    """Run a target's engine on its check rows, ignoring earlier results; empty for a graph without check rows.

    Raises ToolError; GateError if a row fails.
    """
    engine, outcomes = _checked(target, backend, source, source_path(target, backend, source), again=True)
    engine.close()
    return outcomes


def _checked(
    target: Target, backend: str, source: ModelSource, path: Path, again: bool = False
) -> tuple[GraphEngine, list[self_check.CheckOutcome]]:
    """Return an open engine and the outcomes of its check rows; close it if a row fails."""
    from sa3_trt_core.engines import self_check  # imports numpy, which --help and --list do not need

    record, root = BACKENDS[backend], source.onnx_root
    known = [root / name for name in target.onnx] if root is not None else []
    onnx = next((file for file in known if file.is_file()), None)
    engine = record.open(path, target, record.rebuild_command(target.name), onnx)
    try:
        remake = target.produced_by if record.suffix is None else record.rebuild_command(target.name)
        return engine, self_check.require_correct(
            engine, path, self_check.CheckEnvironment.of(record), remake, onnx, again
        )
    except BaseException:
        engine.close()
        raise
