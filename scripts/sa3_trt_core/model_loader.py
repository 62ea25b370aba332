"""Plan the engines of a model, locate their files, and open each engine once, on first use."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from sa3_trt_core import adapter_placement, engines, gpu, targets
from sa3_trt_core.artifacts import manifest
from sa3_trt_core.audio.tiling import require_chunk
from sa3_trt_core.engines.base import Closeable
from sa3_trt_core.errors import InvalidRequest, ToolError, ToolWarning
from sa3_trt_core.hub import resolve
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.text import Tokenizer

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine
    from sa3_trt_core.engines.tensorrt import TensorRtEngine
    from sa3_trt_core.engines.torch import TorchEngine


NULL_ROW_GATES = ("null_row", "null row")  # gate of a DiT's manifest; the second key is that of earlier manifests


@dataclass(frozen=True)
class Plan:
    """Target, backend and file locations of each stage, decided before a file is opened.

    `stages` are loaded up front, in the order they run; the audio encoder is opened on first use unless it is one of
    them. `chunk_frames` is the window of the autoencoder in latent frames: 0 for one piece, None to choose by length.
    """

    targets: Mapping[str, targets.Target]
    backends: Mapping[str, str]
    stages: tuple[str, ...]
    precision: str
    source: ModelSource
    chunk_frames: int | None = None
    loras: LoraSet = field(default_factory=LoraSet)  # of the DiT
    lora_bases: Path | None = None  # native checkpoint for the SVD of -xs adapters
    refit: bool = False  # adapters replace the weights of the base engine

    @property
    def decoder_reach(self) -> int | None:
        """Receptive field of the decoder in latent frames to either side; None if unknown."""
        name = self.targets["dit"].dit
        return None if name is None else targets.find_dit(name).reach


def make_plan(
    dit: str,
    precision: str,
    backend: str = engines.AUTO,
    source: ModelSource | None = None,
    audio_input: bool = False,
    chunk_frames: int | None = None,
) -> Plan:
    """Choose target and backend of each stage, without opening a file. Raises ToolError."""
    if targets.find_dit(dit).reach is None:
        if chunk_frames:
            raise InvalidRequest(
                f"`chunk_frames` is not supported by {dit}: the receptive field of its autoencoder is unknown",
                "omit it, or use 0",
            )
        chunk_frames = 0
    require_chunk(chunk_frames or 0)
    chosen = {
        "text": targets.find_target(targets.TEXT_ENCODER),
        "encode": targets.encoder_for(dit),
        "dit": targets.dit_target(dit, precision),
        "decoder": targets.decoder_for(dit, precision),
    }
    place = source or ModelSource.of()
    return Plan(
        targets=chosen,
        backends={stage: engines.pick_backend(backend, target, place.models_dir) for stage, target in chosen.items()},
        stages=tuple(stage for stage in chosen if audio_input or stage != "encode"),
        precision=precision,
        source=place,
        chunk_frames=chunk_frames,
    )


def plan_with(plan: Plan, loras: LoraSet, lora_bases: Path | None = None, refit: bool = False) -> Plan:
    """Return the plan with a set of adapters; an empty set removes them.

    Raises ToolError with the commands that build a missing merged graph or engine.
    """
    target = adapter_placement.target_with(plan.targets["dit"], plan.backends["dit"], loras, plan.source, refit)
    chosen = {**plan.targets, "dit": target}
    return replace(plan, targets=chosen, loras=loras, lora_bases=lora_bases, refit=refit)


def build_command(plan: Plan, arch: str) -> str | None:
    """Return the command that builds every missing engine of a plan for an architecture; None if all exist."""
    models = plan.source.models_dir
    for name, backend in engines.BUILT.items():
        wanted = [plan.targets[stage] for stage in plan.stages if plan.backends[stage] == name]
        missing = [t.name for t in wanted if not backend.engine_path(models, arch, t).is_file()]
        if missing:
            return f"{backend.rebuild_command(' '.join(missing), arch)} --models-dir {models}"
    return None


class EngineSet(Closeable):
    """Tokenizer and engines of a plan. After `close`, `engine` raises RuntimeError."""

    def __init__(self, plan: Plan) -> None:
        """Locate every file of the plan's stages, so that a missing one is reported before minutes of loading.

        Raises ToolError.
        """
        self.plan = plan
        self._sources: dict[str, Path] = {}
        self._open: dict[str, GraphEngine] = {}
        self.devices: dict[str, str] = {}  # stage -> cuda or cpu, for opened stages
        self._closed = False
        arch = gpu.current_arch()
        command = build_command(plan, arch) if arch is not None else None
        if command is not None:
            raise ToolError(f"{plan.source.models_dir} lacks some of the required engines", f"build them: {command}")
        # Opt-in files first, as they may not be published; then the tokenizer, which is small and behind a licence.
        opt_in = [stage for stage in plan.stages if plan.targets[stage].opt_in]
        for stage in opt_in:
            self._source(stage)
        tokenizer = resolve.resolve_tokenizer(plan.source)
        for stage in plan.stages:
            self._source(stage)
        self.tokenizer = Tokenizer(tokenizer)

    def load(self, on_engine: Callable[[str, int, int], None] | None = None) -> None:
        """Open the engines of the plan's stages in parallel threads. Raises ToolError.

        `on_engine(engine, index from 1, total)` is called after each. Reading and deserialising release the GIL. If one
        fails, `close` closes the others.
        """
        missing = [stage for stage in self.plan.stages if stage not in self._open]
        failed: dict[str, Exception] = {}
        places: dict[str, tuple[str, str]] = {}
        with ThreadPoolExecutor(max_workers=max(1, len(missing))) as pool:
            opening = {pool.submit(self._opened, stage): stage for stage in missing}
            for done in as_completed(opening):
                stage = opening[done]
                try:
                    engine = self._open[stage] = done.result()
                    places[stage] = engine.device, engine.cpu_reason
                except Exception as error:  # raised below, once all threads have ended
                    failed[stage] = error
                    continue
                if on_engine is not None:
                    name = f"{self.plan.targets[stage].name} ({self.plan.backends[stage]})"
                    on_engine(name, len(places), len(missing))
        for stage in missing:
            if stage in failed:
                raise failed[stage]
        self._note_places({stage: places[stage] for stage in missing})

    def engine(self, stage: str) -> GraphEngine:
        """Return the engine of a stage (text, encode, dit or decoder), opening it if needed. Raises ToolError."""
        if self._closed:
            raise RuntimeError("these engines are closed")
        if stage not in self._open:
            engine = self._open[stage] = self._opened(stage)
            self._note_places({stage: (engine.device, engine.cpu_reason)})
        return self._open[stage]

    def identity(self, stage: str) -> str | None:
        """Return the manifest id of a stage's file; None for a file without manifest, as on the hub."""
        return manifest.identity(self._source(stage))

    def has_null_rule(self) -> bool:
        """Return True if, by its manifest, the DiT zeroes all cross tokens of the unconditional row."""
        record = manifest.read_manifest(self._source("dit"))
        return record is not None and any(record.gates.get(name) is True for name in NULL_ROW_GATES)

    @property
    def open_stages(self) -> tuple[str, ...]:
        """The stages whose engines are open."""
        return tuple(self._open)

    def release(self, stage: str) -> None:
        """Close the engine of a stage, if it is open; the next use opens it again."""
        if stage in self._open:
            self._open.pop(stage).close()

    def close(self) -> None:
        """Close every engine, even if one of them raises."""
        self._closed = True
        with ExitStack() as stack:
            for engine in self._open.values():
                stack.callback(engine.close)
            self._open.clear()

    def set_loras(self, loras: LoraSet, lora_bases: Path | None = None) -> None:
        """Replace the adapters of the DiT: in place if its backend merges adapters, else by opening another engine.

        Raises ToolError without changing anything.
        """
        plan = plan_with(self.plan, loras, lora_bases, self.plan.refit)
        if "dit" in self._open and engines.BACKENDS[plan.backends["dit"]].merges_adapters:
            _merge(plan, self._open["dit"])
        if plan.refit and loras.digest != self.plan.loras.digest:
            self.release("dit")  # reopened with the base weights, without those of the last refit
        if plan.targets["dit"] != self.plan.targets["dit"]:
            self.release("dit")
            self._sources.pop("dit", None)
        self.plan = plan

    def note_ranges(self) -> None:
        """Warn about layers whose activations left FP8's calibrated range in the first run with new adapters."""
        layers: list[str] = getattr(self._open.get("dit"), "saturated", list)() if self.plan.loras else []
        if layers:
            text = "with these adapters, activations exceed FP8's calibrated range and saturate in: "
            warnings.warn(text + ", ".join(layers), ToolWarning, stacklevel=3)

    def _opened(self, stage: str) -> GraphEngine:
        target, backend = self.plan.targets[stage], self.plan.backends[stage]
        engine = engines.open_engine(target, backend, self.plan.source, self._source(stage))
        merges = engines.BACKENDS[backend].merges_adapters
        if stage == "dit" and self.plan.loras and (merges or self.plan.refit):
            try:
                (_merge if merges else _refit)(self.plan, engine)
            except BaseException:
                engine.close()
                raise
        return engine

    def _note_places(self, places: Mapping[str, tuple[str, str]]) -> None:
        """Record the device of opened stages; warn once about those on the CPU beside a GPU, with the reason."""
        reasons: dict[str, list[str]] = {}
        for stage, (device, reason) in places.items():
            if reason and self.devices.get(stage) != device:
                reasons.setdefault(reason, []).append(stage)
            self.devices[stage] = device
        for reason, stages in reasons.items():
            text = f"{', '.join(stages)} on the CPU, many times slower than on this machine's GPU: {reason}"
            warnings.warn(text, ToolWarning, stacklevel=3)

    def _source(self, stage: str) -> Path:
        if stage not in self._sources:
            plan = self.plan
            self._sources[stage] = engines.source_path(plan.targets[stage], plan.backends[stage], plan.source)
        return self._sources[stage]


def _merge(plan: Plan, engine: GraphEngine) -> None:
    """Merge the adapters of a plan into a loaded DiT. Raises ToolError."""
    source, rebuild = adapter_placement.merge_source(plan.targets["dit"], plan.backends["dit"], plan.source.models_dir)
    cast("TorchEngine", engine).set_loras(plan.loras, source, rebuild, plan.lora_bases)


def _refit(plan: Plan, engine: GraphEngine) -> None:
    """Replace the weights of a loaded DiT by those of the merged graph, and check them. Raises ToolError, GateError."""
    from sa3_trt_core.engines import self_check

    graph = adapter_placement.merged_graph(plan.targets["dit"], plan.loras, plan.source)
    assert graph is not None, "plan_with looked for it"
    cast("TensorRtEngine", engine).refit(graph)
    self_check.require_refitted(engine, graph, plan.targets["dit"].name)
