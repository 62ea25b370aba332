"""What an engine on this machine is: missing, current, stale with the reason, or foreign. Reads no graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sa3_trt_core import engines, shapes
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.targets import Target

MISSING, CURRENT, STALE, FOREIGN, NO_GPU = "missing", "current", "stale", "foreign", "no GPU"
NO_ENGINE = "no engine"  # of a backend that leaves such a graph to another


@dataclass(frozen=True)
class State:
    """One of the words above, the reason where there is one, and the size of the engine file in bytes."""

    name: str
    reason: str = ""
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


def state_of(target: Target, models: Path, arch: str | None, backend: str, onnx_root: Path | None = None) -> State:
    """Return the state of one engine, by its manifest alone.

    Stale: torn, built by another TensorRT than the installed one, for another contract, or of another graph than the
    one in `onnx_root`, as far as that graph's own manifest tells. Foreign: a file without a manifest, which somebody
    else made or a killed build left. A build looks closer: it reads every byte of the graph.
    """
    record = engines.BACKENDS[backend]
    if not record.supports(target):
        return State(NO_ENGINE, f"{engines.DIRECT.label} runs it")
    if arch is None:
        return State(NO_GPU)
    return state_of_path(record.engine_path(models, arch, target), target, arch, backend, onnx_root)


def state_of_path(path: Path, target: Target, arch: str, backend: str, onnx_root: Path | None = None) -> State:
    """Return the same for an engine file of any name."""
    if not path.is_file():
        return State(MISSING)
    size = path.stat().st_size
    if not manifest.manifest_path(path).is_file():
        return State(FOREIGN, "it has no manifest", size)
    try:
        reason = manifest.verify_manifest(path) or _outdated(target, path, arch, backend, onnx_root)
    except ToolError as error:
        reason = error.message
    return State(STALE, reason, size) if reason else State(CURRENT, "", size)


def _outdated(target: Target, path: Path, arch: str, backend: str, onnx_root: Path | None) -> str | None:
    record = manifest.read_manifest(path)
    assert record is not None
    settings = record.settings
    if (settings.get("target"), settings.get("backend"), settings.get("arch")) != (target.name, backend, arch):
        return f"it is {settings.get('target')} by {settings.get('backend')} for {settings.get('arch')}"
    version = engines.BACKENDS[backend].version() or settings.get("backend_version")
    if settings.get("backend_version") != version:
        return f"built by {backend} {settings.get('backend_version')}, {version} is installed"
    profile = {symbol: list(limits) for symbol, limits in shapes.CONTRACTS[target.kind].profile.items()}
    served = settings.get("profile")
    if served not in (profile, profile | {"B": [1, 1, 1]}) and not settings.get("prebuilt"):
        return "the lengths and batches that it serves are others"
    graph = resolve.local_onnx(onnx_root, target) if onnx_root is not None else None
    made = manifest.read_manifest(graph) if graph is not None else None
    if graph is None or made is None or manifest.verify_manifest(graph) is not None:
        return None
    sources = [name for name in (graph.name, *resolve.external_data_names(graph)) if name in made.files]
    changed = [name for name in sources if record.inputs.get(name) != made.files[name].sha256]
    return f"{graph.parent / changed[0]} has changed" if changed else None
