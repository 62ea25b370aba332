"""Choosing and opening an engine for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core import gpu, paths
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.targets import Target

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

BACKENDS = ("auto", "tensorrt", "tensorrt_rtx", "torch", "onnxruntime")


def pick_backend(name: str, target: Target, models_dir: Path) -> str:
    """The backend to use for a target: `name` itself, or for "auto" the best whose engine is built and can run here.

    "torch" is for the DiT alone: ONNX Runtime runs the rest, which is a small part of the time. Raises ToolError for an
    unknown backend, or one whose package is missing.
    """
    arch = gpu.current_arch()
    if name == "auto":
        for backend in gpu.TENSORRT_BACKENDS:
            built = arch is not None and paths.engine_path(models_dir, arch, target, backend).is_file()
            if built and gpu.tensorrt_module(backend) is not None:
                return backend
        packed = arch is not None and paths.engine_path(models_dir, arch, target, "torch").is_file()
        return "torch" if packed else "onnxruntime"
    if name == "torch":
        if target.kind == "dit" and target.precision == "fp32":
            raise ToolError("the torch backend runs fp16mixed and fp8, not fp32", "choose one, or another --backend")
        return "torch" if target.kind == "dit" else "onnxruntime"
    if name not in BACKENDS:
        raise ToolError(f"unknown backend {name!r}", f"known: {', '.join(BACKENDS)}")
    if name not in gpu.available_backends():
        raise ToolError(f"the Python package {name} is not installed", "pip install it, or choose --backend auto")
    return name


def source_path(
    target: Target, backend: str, onnx_root: Path | None, models_dir: Path, revision: str | None = None,
    offline: bool = False,
) -> Path:  # fmt: skip
    """The file that a backend loads: the engine of this machine's GPU, or the ONNX (downloaded if need be)."""
    if backend == "onnxruntime":
        return resolve.resolve_onnx(target, onnx_root, offline, revision)
    arch = gpu.current_arch() or (paths.NO_GPU if backend == "torch" else None)
    if arch is None:
        raise ToolError(f"{backend} needs an NVIDIA GPU and none is visible", "choose --backend onnxruntime")
    path = paths.engine_path(models_dir, arch, target, backend)
    if not path.is_file():
        raise ToolError(f"no engine {path}", f"build it: {rebuild_command(target.name, backend, arch)}")
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
    if backend == "torch":
        from sa3_trt_core.engines.torch import TorchEngine

        return TorchEngine(path, rebuild_command(target.name, backend, gpu.current_arch() or paths.NO_GPU))
    from sa3_trt_core.engines.tensorrt import TensorRtEngine

    rebuild = rebuild_command(target.name, backend, gpu.current_arch() or "ARCH")
    known = [onnx_root / name for name in target.onnx] if onnx_root is not None else []
    onnx = next((file for file in known if file.is_file()), None)
    return TensorRtEngine(path, backend, rebuild, onnx, capture=target.kind == "dit")


def rebuild_command(names: str, backend: str, arch: str) -> str:
    """The command that builds the engines of targets, named with spaces between."""
    return f"python build/build_from_onnx.py {names} --backend {backend} --arch {arch}"
