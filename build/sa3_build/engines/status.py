"""State of an engine on this machine: missing, current, stale with the reason, or foreign. Does not read graphs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sa3_trt_core import engines, shapes
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.targets import Target

MISSING, CURRENT, STALE, FOREIGN, NO_GPU = "missing", "current", "stale", "foreign", "no GPU"
NO_ENGINE = "no engine"  # the backend runs this graph through another one


@dataclass(frozen=True)
class State:
    """One of the states above, its reason if it has one, and the size of the engine file in bytes."""

    name: str
    reason: str = ""
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


def state_of(target: Target, models: Path, arch: str | None, backend: str, onnx_root: Path | None = None) -> State:
    """Return the state of one engine, from its manifest.

    Stale: incomplete, built by another TensorRT version than the installed one, for another contract, or from another
    graph than the one in `onnx_root`, according to that graph's manifest. Foreign: a file without a manifest, built
    elsewhere or left by a killed build. A build checks more: it reads every byte of the graph.
    """
    record = engines.BACKENDS[backend]
    if not record.supports(target):
        return State(NO_ENGINE, f"{engines.DIRECT.label} runs it")
    if arch is None:
        return State(NO_GPU)
    return state_of_path(record.engine_path(models, arch, target), target, arch, backend, onnx_root)


def state_of_path(
    path: Path, target: Target, arch: str, backend: str, onnx_root: Path | None = None, refits: bool = False
) -> State:
    """Return the state of an engine file of any name; with `refits` an engine that is not refittable is stale."""
    if not path.is_file():
        return State(MISSING)
    size = path.stat().st_size
    if not manifest.manifest_path(path).is_file():
        return State(FOREIGN, "no manifest", size)
    try:
        reason = manifest.verify_manifest(path) or _outdated(target, path, arch, backend, onnx_root)
        record = manifest.read_manifest(path)
        if reason is None and refits and record is not None and not record.settings.get("refittable"):
            reason = "it was built without --refittable"
    except ToolError as error:
        reason = error.message
    return State(STALE, reason, size) if reason else State(CURRENT, "", size)


def _outdated(target: Target, path: Path, arch: str, backend: str, onnx_root: Path | None) -> str | None:
    record = manifest.read_manifest(path)
    assert record is not None
    settings = record.settings
    if (settings.get("target"), settings.get("backend"), settings.get("arch")) != (target.name, backend, arch):
        return f"built as {settings.get('target')} by {settings.get('backend')} for {settings.get('arch')}"
    version = engines.BACKENDS[backend].version() or settings.get("backend_version")
    if settings.get("backend_version") != version:
        return f"built with {backend} {settings.get('backend_version')}; installed: {version}"
    profile = {symbol: list(limits) for symbol, limits in shapes.CONTRACTS[target.kind].profile.items()}
    built_profile = settings.get("profile")
    if built_profile not in (profile, profile | {"B": [1, 1, 1]}) and not settings.get("prebuilt"):
        return "built for other lengths or batch sizes"
    graph = resolve.local_onnx(onnx_root, target) if onnx_root is not None else None
    graph_manifest = manifest.read_manifest(graph) if graph is not None else None
    if graph is None or graph_manifest is None or manifest.verify_manifest(graph) is not None:
        return None
    sources = [name for name in (graph.name, *resolve.external_data_names(graph)) if name in graph_manifest.files]
    changed = [name for name in sources if record.inputs.get(name) != graph_manifest.files[name].sha256]
    return f"{graph.parent / changed[0]} has changed" if changed else None
