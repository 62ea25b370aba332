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
    """Loads the file of a target; `rebuild` is the command for messages, `onnx` the graph in use where it is known."""

    def __call__(self, path: Path, target: Target, rebuild: str, onnx: Path | None) -> GraphEngine: ...


@dataclass(frozen=True)
class Backend:
    """One way to run the graphs. Everything that lists, picks, builds or names backends reads this record.

    `name` is the value of --backend, `package` the module that must be importable, `label` the product's name.
    `suffix` is that of its engine files; None where it runs the ONNX itself and nothing is built.
    `runs` are the precisions by kind of graph (shapes.CONTRACTS); the rest is left to the backend that needs no engine,
    and so are graphs of the kinds in `optional` while no engine of them is built.
    `arches` are those that engines can be built for; `on_cpu` that they also run without a GPU;
    `on_gpu` tells whether it runs on this machine's GPU when it is asked now;
    `builds_elsewhere` that the builder needs no GPU of the architecture that it builds for;
    `merges_adapters` that LoRA adapters go into its loaded weights, where the others run a graph or an engine with the
    adapters in it; `refits` that weights can be replaced in an engine that was built for it.
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
        """Return True if the package is installed; a GPU is another question."""
        return self.find_package(self.package) is not None

    def version(self) -> str | None:
        """The installed version that engines depend on; None where it is not installed or they depend on none."""
        version = getattr(self.find_package(self.package), "__version__", None)
        return None if version is None else str(version)

    def supports(self, target: Target) -> bool:
        """Return True if it runs this graph at this precision."""
        return target.precision in self.runs.get(target.kind, ())

    def arch_here(self) -> str | None:
        """Return the architecture of this machine that its engines are for; None where they cannot run."""
        return gpu.current_arch() or (paths.NO_GPU if self.on_cpu else None)

    def engine_path(self, models_dir: Path, arch: str, target: Target) -> Path:
        """models/<arch>/<folder>/<stem><suffix>, where an engine is built and looked for."""
        if self.suffix is None:
            raise ValueError(f"{self.name} has no engines")
        return models_dir / arch / f"{target.engine}{self.suffix}"

    def leaves(self, target: Target, models_dir: Path) -> bool:
        """Return True if a target is left to the backend that needs no engine, where this one is asked for."""
        arch = self.arch_here()
        built = arch is not None and self.engine_path(models_dir, arch, target).is_file()
        return target.kind not in self.runs or (target.kind in self.optional and not built)

    def is_ready(self, target: Target, models_dir: Path) -> bool:
        """Return True if it can run a target on this machine now: nothing is to be built, or the engine is there."""
        if self.suffix is None or not self.supports(target):
            return self.suffix is None
        arch = gpu.current_arch()
        return arch is not None and self.engine_path(models_dir, arch, target).is_file() and self.available()

    def require_engine(self, target: Target) -> None:
        """Raise ToolError for a target that this backend has no engine of."""
        if not self.supports(target):
            known = ", ".join(f"{kind} in {' or '.join(precisions)}" for kind, precisions in self.runs.items())
            raise ToolError(
                f"{target.name} has no {self.name} engine: that is for {known}",
                f"with `backend={self.name}`, ONNX Runtime runs everything else; nothing has to be built for it",
            )

    def require_precision(self, target: Target) -> None:
        """Raise ToolError for a graph that it runs at other precisions than the target's."""
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
        """The command that builds the engines of targets, named with spaces between, for this machine or `arch`."""
        chosen = arch or self.arch_here() or "ARCH"
        return f"python build/build_from_onnx.py {names} --backend {self.name} --arch {chosen}"
