"""DiTs to compare: each a precision, an ONNX file or an engine, with the backend that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sa3_trt_core import adapter_placement, engines, targets
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.paths import ModelSource

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine
    from sa3_trt_core.engines.torch import TorchEngine


@dataclass(frozen=True)
class ModelPaths:
    """Model to compare, and the folders of its engines and graphs."""

    dit: str
    source: ModelSource
    loras: LoraSet = field(default_factory=LoraSet)  # apply to models named by a precision


@dataclass(frozen=True)
class ComparedModel:
    """One DiT: display name, file and backend; `plain` is ONNX Runtime without graph optimization."""

    name: str
    target: targets.Target
    backend: str
    path: Path
    plain: bool = False
    loras: LoraSet = field(default_factory=LoraSet)  # merged at opening; empty when the graph already contains them

    def open(self) -> GraphEngine:
        """Load the engine. Raises ToolError."""
        if self.plain:
            from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

            return OnnxRuntimeEngine(self.path, low_memory=True)
        engine = engines.open_engine(self.target, self.backend, ModelSource(), self.path)
        if self.loras:
            models_dir = self.path.parent.parent.parent  # models/<arch>/<folder>/<file>
            fp16_graph, rebuild = adapter_placement.merge_source(self.target, self.backend, models_dir)
            cast("TorchEngine", engine).set_loras(self.loras, fp16_graph, rebuild)
        return engine

    def described(self) -> dict[str, str | None]:
        """Return name, backend, file and manifest identity for the report."""
        return {
            "name": self.name,
            "backend": f"{self.backend}, not optimized" if self.plain else self.backend,
            "file": str(self.path),
            "manifest": manifest.identity(self.path),
        }


def find_model(text: str, backend: str, paths: ModelPaths) -> ComparedModel:
    """Return the DiT named by `text`: fp16mixed, fp32, fp8, or the path of a .onnx, .trt or .rtx file. Raises
    ToolError.

    Files are resolved here, so that a missing one is reported before anything is loaded.
    """
    if text in targets.PRECISIONS:
        target = targets.dit_target(paths.dit, text)
        backend_name = engines.pick_backend(backend, target, paths.source.models_dir)
        return _adapted(text, target, backend_name, paths)
    path = Path(text)
    if not path.is_file():
        hint = f"give {', '.join(targets.PRECISIONS)}, or a path"
        raise ToolError(f"unknown DiT {text}: not a precision or a file", hint)
    target = targets.dit_target(paths.dit, targets.PRECISIONS[0])
    engine = engines.backend_of_file(path)
    if engine is not None:
        backend_name = engines.pick_backend(engine.name, target, paths.source.models_dir)
        return ComparedModel(path.stem, target, backend_name, path)
    direct = engines.DIRECT.name
    backend_name = engines.pick_backend(direct if backend == engines.AUTO else backend, target, paths.source.models_dir)
    if backend_name in engines.BUILT:
        hint = f"give the path of its engine, or --backend {direct}"
        raise ToolError(f"backend {backend_name} cannot run {path}", hint)
    return ComparedModel(path.stem, target, backend_name, path)


def _adapted(name: str, target: targets.Target, backend: str, paths: ModelPaths) -> ComparedModel:
    """Return the DiT of a precision with adapters: of a merged graph or engine, or merged at opening."""
    target = adapter_placement.target_with(target, backend, paths.loras, paths.source)
    loras = paths.loras if engines.BACKENDS[backend].merges_adapters else LoraSet()
    return ComparedModel(name, target, backend, engines.source_path(target, backend, paths.source), loras=loras)


def control_model(reference: ComparedModel, paths: ModelPaths) -> ComparedModel | None:
    """Return the reference in another backend or with other kernels, as a control; None when neither is available.

    A TensorRT engine is compared with its ONNX file. An ONNX file is compared with a built engine that runs on this
    machine, otherwise with ONNX Runtime without graph optimization.
    """
    try:
        direct = engines.DIRECT.name
        if reference.backend != direct:
            return _adapted(reference.name, adapter_placement.base_target(reference.target), direct, paths)
        fastest = engines.pick_backend(engines.AUTO, reference.target, paths.source.models_dir)
        if fastest != direct and reference.name == reference.target.precision:
            path = engines.source_path(reference.target, fastest, paths.source)
            return replace(reference, backend=fastest, path=path)
    except ToolError:
        return None
    return replace(reference, plain=True)
