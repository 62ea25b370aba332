"""The record of a backend: name, supported graphs, devices, and functions that locate and open its engines."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sa3_trt_core import gpu, paths
from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import CONTRACTS
from sa3_trt_core.targets import PRECISIONS, Target

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

EVERYTHING: Mapping[str, tuple[str, ...]] = dict.fromkeys(CONTRACTS, PRECISIONS)


class Open(Protocol):
    """Function that loads a target's file; `rebuild` is a command for messages, `onnx` the graph in use, if known."""

    def __call__(self, path: Path, target: Target, rebuild: str, onnx: Path | None) -> GraphEngine: ...


@dataclass(frozen=True)
class Backend:
    """Properties of one backend, read by everything that lists, selects, builds or names backends.

    `name`: value of --backend. `package`: module that must be importable. `label`: product name.
    `suffix`: extension of its engine files; None if it runs the ONNX itself, without a build.
    `runs`: precisions by kind of graph (shapes.CONTRACTS). DIRECT runs other graphs, and those of the kinds in
    `optional` without a built engine.
    `arches`: architectures that engines can be built for. `on_cpu`: engines also run without a GPU.
    `on_gpu`: returns True if the backend runs on this machine's GPU.
    `builds_elsewhere`: the builder needs no GPU of the target architecture.
    `merges_adapters`: LoRA adapters are merged into loaded weights; other backends run a merged graph or engine.
    `refits`: weights can be replaced in an engine built as refittable.
    """

    name: str
    label: str
    package: str
    open: Open
    suffix: str | None = None
    runs: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: EVERYTHING)
    optional: tuple[str, ...] = ()
    arches: tuple[str, ...] = paths.ARCHES
    on_cpu: bool = False
    builds_elsewhere: bool = False
    merges_adapters: bool = False
    refits: bool = False
    find_package: Callable[[str], object] = importlib.util.find_spec
    on_gpu: Callable[[], bool] = gpu.has_nvidia_gpu

    def available(self) -> bool:
        """Return True if the package is installed, with or without a GPU."""
        return self.find_package(self.package) is not None

    def version(self) -> str | None:
        """Return the installed version of the package; None if it is missing or has no version."""
        version = getattr(self.find_package(self.package), "__version__", None)
        return None if version is None else str(version)

    def supports(self, target: Target) -> bool:
        """Return True if the backend runs a target's graph at its precision."""
        return target.precision in self.runs.get(target.kind, ())

    def arch_here(self) -> str | None:
        """Return the architecture of engines for this machine; None if engines cannot run here."""
        return gpu.current_arch() or (paths.NO_GPU if self.on_cpu else None)

    def engine_path(self, models_dir: Path, arch: str, target: Target) -> Path:
        """Return models/<arch>/<folder>/<stem><suffix>, the path of an engine."""
        if self.suffix is None:
            raise ValueError(f"{self.name} has no engines")
        return models_dir / arch / f"{target.engine}{self.suffix}"

    def leaves(self, target: Target, models_dir: Path) -> bool:
        """Return True if DIRECT runs this target instead of the selected backend."""
        arch = self.arch_here()
        built = arch is not None and self.engine_path(models_dir, arch, target).is_file()
        return target.kind not in self.runs or (target.kind in self.optional and not built)

    def is_ready(self, target: Target, models_dir: Path) -> bool:
        """Return True if the backend can run a target on this machine without a build."""
        if self.suffix is None or not self.supports(target):
            return self.suffix is None
        arch = gpu.current_arch()
        return arch is not None and self.engine_path(models_dir, arch, target).is_file() and self.available()

    def require_engine(self, target: Target) -> None:
        """Raise ToolError for a target that the backend does not support."""
        if not self.supports(target):
            known = ", ".join(f"{kind} in {' or '.join(precisions)}" for kind, precisions in self.runs.items())
            raise ToolError(
                f"{target.name} has no {self.name} engine: that is for {known}",
                f"with `backend={self.name}`, ONNX Runtime runs everything else; nothing has to be built for it",
            )

    def require_precision(self, target: Target) -> None:
        """Raise ToolError if the backend does not run the target's graph at its precision."""
        known = self.runs[target.kind]
        if target.precision not in known:
            names = " and ".join(known)
            raise ToolError(
                f"the {self.name} backend runs {names}, not {target.precision}", "choose one, or another `backend`"
            )

    def require_available(self) -> None:
        """Raise ToolError if the package is not installed."""
        if not self.available():
            message = f"the Python package {self.package} is not installed"
            raise ToolError(message, "pip install it, or choose `backend=auto`")

    def rebuild_command(self, names: str, arch: str | None = None) -> str:
        """Return the command that builds the engines of space-separated `names` for `arch` (default: this machine)."""
        chosen = arch or self.arch_here() or "ARCH"
        return f"python build/build_from_onnx.py {names} --backend {self.name} --arch {chosen}"
