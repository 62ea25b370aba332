"""Which DiTs are compared: a precision, an ONNX file or an engine, each with the backend that runs it."""

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
class Place:
    """Which model is compared, and where its engines and graphs are looked for."""

    dit: str
    source: ModelSource
    loras: LoraSet = field(default_factory=LoraSet)  # of both models that are named by their precision


@dataclass(frozen=True)
class Side:
    """One DiT: what it is called, its file and its backend; `plain` is ONNX Runtime without graph optimisation."""

    name: str
    target: targets.Target
    backend: str
    path: Path
    plain: bool = False
    loras: LoraSet = field(default_factory=LoraSet)  # merged when it is opened; a merged graph has them in it

    def open(self) -> GraphEngine:
        """Load it. Raises ToolError."""
        if self.plain:
            from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

            return OnnxRuntimeEngine(self.path, low_memory=True)
        engine = engines.open_engine(self.target, self.backend, ModelSource(), self.path)
        if self.loras:
            models_dir = self.path.parent.parent.parent  # models/<arch>/<folder>/<file>
            half, rebuild = adapter_placement.merge_source(self.target, self.backend, models_dir)
            cast("TorchEngine", engine).set_loras(self.loras, half, rebuild)
        return engine

    def described(self) -> dict[str, str | None]:
        """What the report says of it."""
        return {
            "name": self.name,
            "backend": f"{self.backend}, not optimised" if self.plain else self.backend,
            "file": str(self.path),
            "manifest": manifest.identity(self.path),
        }


def find_side(text: str, backend: str, place: Place) -> Side:
    """The DiT that a person names: fp16mixed, fp32, fp8, or the path of a .onnx, .trt or .rtx file. Raises ToolError.

    Files are found, and a missing one is told, before anything is loaded.
    """
    if text in targets.PRECISIONS:
        target = targets.dit_target(place.dit, text)
        chosen = engines.pick_backend(backend, target, place.source.models_dir)
        return _adapted(text, target, chosen, place)
    path = Path(text)
    if not path.is_file():
        raise ToolError(f"{text} is no precision and no file", f"give {', '.join(targets.PRECISIONS)}, or a path")
    target = targets.dit_target(place.dit, targets.PRECISIONS[0])
    engine = engines.backend_of_file(path)
    if engine is not None:
        return Side(path.stem, target, engines.pick_backend(engine.name, target, place.source.models_dir), path)
    direct = engines.DIRECT.name
    chosen = engines.pick_backend(direct if backend == engines.AUTO else backend, target, place.source.models_dir)
    if chosen in engines.BUILT:
        raise ToolError(f"{chosen} runs engines, not {path}", f"give the engine's own path, or --backend {direct}")
    return Side(path.stem, target, chosen, path)


def _adapted(name: str, target: targets.Target, backend: str, place: Place) -> Side:
    """A DiT of a precision with the adapters of a place: a merged graph or engine, or merged when it is opened."""
    target = adapter_placement.target_with(target, backend, place.loras, place.source)
    loras = place.loras if engines.BACKENDS[backend].merges_adapters else LoraSet()
    return Side(name, target, backend, engines.source_path(target, backend, place.source), loras=loras)


def control_side(reference: Side, place: Place) -> Side | None:
    """The reference in another backend, or with other kernels where there is one backend only; None where neither is.

    A TensorRT engine is compared with its ONNX, an ONNX with a built engine that this machine runs, else with ONNX
    Runtime without graph optimisation.
    """
    try:
        direct = engines.DIRECT.name
        if reference.backend != direct:
            return _adapted(reference.name, adapter_placement.base_target(reference.target), direct, place)
        best = engines.pick_backend(engines.AUTO, reference.target, place.source.models_dir)
        if best != direct and reference.name == reference.target.precision:
            path = engines.source_path(reference.target, best, place.source)
            return replace(reference, backend=best, path=path)
    except ToolError:
        return None
    return replace(reference, plain=True)
