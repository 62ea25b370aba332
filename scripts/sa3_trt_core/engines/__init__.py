"""Choosing and opening an engine for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core import device, hub, paths
from sa3_trt_core.errors import ToolError
from sa3_trt_core.targets import Target

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

BACKENDS = ("auto", "tensorrt", "tensorrt_rtx", "torch", "onnxruntime")


def pick_backend(name: str, target: Target, models_dir: Path) -> str:
    """The backend to use for a target: `name` itself, or for "auto" the best whose engine is built and can run here.

    Raises ToolError for a backend that is not there yet or whose package is missing.
    """
    if name == "auto":
        arch = device.current_arch()
        for backend in device.TENSORRT_BACKENDS:
            built = arch is not None and paths.engine_path(models_dir, arch, target, backend).is_file()
            if built and device.tensorrt_module(backend) is not None:
                return backend
        return "onnxruntime"
    if name == "torch":
        raise ToolError("the torch backend is not there yet", "use --backend onnxruntime")
    if name not in BACKENDS:
        raise ToolError(f"unknown backend {name!r}", f"known: {', '.join(BACKENDS)}")
    if name not in device.available_backends():
        raise ToolError(f"the Python package {name} is not installed", "pip install it, or choose --backend auto")
    return name


def source_path(target: Target, backend: str, onnx_root: Path | None, models_dir: Path) -> Path:
    """The file that a backend loads: the engine of this machine's GPU, or the ONNX (downloaded if need be)."""
    if backend == "onnxruntime":
        return hub.resolve_onnx(target, onnx_root)
    arch = device.current_arch()
    if arch is None:
        raise ToolError(f"{backend} needs an NVIDIA GPU and none is visible", "choose --backend onnxruntime")
    path = paths.engine_path(models_dir, arch, target, backend)
    if not path.is_file():
        raise ToolError(f"no engine {path}", f"build it: {rebuild_command(target, backend, arch)}")
    return path


def open_engine(
    target: Target, backend: str, onnx_root: Path | None, models_dir: Path, path: Path | None = None
) -> GraphEngine:
    """Load a target with a backend that pick_backend gave; `path` is what source_path found, if asked before.

    Raises ToolError.
    """
    path = path or source_path(target, backend, onnx_root, models_dir)
    if backend == "onnxruntime":
        from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(path)
    from sa3_trt_core.engines.tensorrt import TensorRtEngine

    rebuild = rebuild_command(target, backend, device.current_arch() or "ARCH")
    known = [onnx_root / name for name in target.onnx] if onnx_root is not None else []
    onnx = next((file for file in known if file.is_file()), None)
    return TensorRtEngine(path, backend, rebuild, onnx, capture=target.kind == "dit")


def rebuild_command(target: Target, backend: str, arch: str) -> str:
    """The command that builds a target's engine."""
    return f"python build/build_from_onnx.py {target.name} --backend {backend} --arch {arch}"
