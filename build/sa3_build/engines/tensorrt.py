"""Compile an ONNX graph to a TensorRT engine: strongly typed, with the contract's optimization profile.

`tensorrt_rtx` compiles for any architecture without a GPU; `tensorrt` compiles for this machine's GPU. The manifest is
written last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_build.engines import refittable, timing_cache
from sa3_build.engines.dit_facts import dit_facts
from sa3_build.graph import io as graph_io
from sa3_build.graph.check_row_files import engine_check_rows
from sa3_build.passes import lower_plugins
from sa3_build.recipes import requirements_check
from sa3_trt_core import engines, gpu, paths, shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.build import Draft, build
from sa3_trt_core.console import format_seconds
from sa3_trt_core.engines import tensorrt_refit
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import download, resolve
from sa3_trt_core.targets import Target

if TYPE_CHECKING:
    import tensorrt as trt

FP8_ARCHES = ("sm_89", "sm_90", "sm_100", "sm_120", "sm_121")
HEARTBEAT_SECONDS = 15.0
CURRENT = "built from the same graph with the same settings"


@dataclass(frozen=True)
class Built:
    """One finished engine; `why` is the reason why it was built or kept."""

    path: Path
    seconds: float
    bytes: int
    reused: bool
    why: str = ""


def require_arch(target: Target, backend: str, arch: str) -> None:
    """Raise ToolError for an unsupported architecture, before anything is read or downloaded."""
    record = engines.BACKENDS[backend]
    if arch == paths.NO_GPU and not record.on_cpu:
        others = " or ".join(candidate.name for candidate in engines.BUILT.values() if candidate.on_cpu)
        raise ToolError(f"{backend} builds for NVIDIA GPUs", f"give --arch, e.g. --arch sm_89, or --backend {others}")
    if target.precision == "fp8" and arch not in (*FP8_ARCHES, paths.NO_GPU):
        raise ToolError(
            f"{target.name} needs FP8 tensor cores, which {arch} does not have (sm_89 and later do)",
            f"build the FP16-mixed engine instead: {target.name.removesuffix('-fp8')}",
        )
    if arch not in (*record.arches, paths.NO_GPU):
        others = " or ".join(candidate.name for candidate in engines.BUILT.values() if arch in candidate.arches)
        raise ToolError(
            f"{record.label} does not build for {arch}",
            f"it builds for {', '.join(record.arches)}; try --backend {others}",
        )
    if not record.builds_elsewhere and arch != gpu.current_arch():
        present = gpu.current_arch() or "no NVIDIA GPU"
        others = " or ".join(candidate.name for candidate in engines.BUILT.values() if candidate.builds_elsewhere)
        raise ToolError(
            f"{backend} builds for the GPU in this machine only ({present}), not for {arch}",
            f"build on that machine, or use --backend {others}, which needs no GPU",
        )


def load_backend(backend: str) -> Any:
    """Return the Python module of a TensorRT backend. Raises ToolError when it is not installed."""
    module = gpu.tensorrt_module(backend)
    if module is None:
        package = backend.replace("_", "-")
        raise ToolError(f"{package} is not installed", f"pip install {package} (pinned in the requirements files)")
    return module


def check_graph(onnx: Path, target: Target) -> None:
    """Raise ToolError for an incomplete file, another kind of graph, or a plug-in that cannot be lowered."""
    model = graph_io.load(onnx)
    present = sorted(str(value.name) for value in model.graph.inputs)
    missing = [spec.name for spec in shapes.CONTRACTS[target.kind].inputs if spec.name not in present]
    if missing:
        raise ToolError(
            f"{onnx} is not a {target.kind} graph: it has no input {missing[0]} (its inputs: {', '.join(present)})",
            f"rebuild the graph: {target.produced_by}",
        )
    plugins = lower_plugins.plugged(model)
    custom_nodes = [node for node in model.graph if node.domain not in ("", "ai.onnx") and node not in plugins]
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in custom_nodes})
    if foreign:
        raise ToolError(
            f"{onnx} contains the plug-in op {foreign[0]}, which is not available",
            f"export it with standard operators only: {target.produced_by}",
        )
    if plugins:
        lower_plugins.lowered(onnx)


def build_settings(
    target: Target, backend: str, arch: str, one_row: bool = False, refits: bool = False
) -> dict[str, Any]:
    """Return the settings that an engine depends on besides its ONNX, for its manifest."""
    module = load_backend(backend)
    profile = {symbol: list(limits) for symbol, limits in shapes.CONTRACTS[target.kind].profile.items()}
    if one_row:
        profile["B"] = [1, 1, 1]
    return {
        "target": target.name,
        "backend": backend,
        "backend_version": str(module.__version__),
        "arch": arch,
        "precision": target.precision,
        "profile": profile,
        **({tensorrt_refit.SETTING: True} if refits else {}),
    }


def compile_engine(
    onnx: Path, target: Target, backend: str, arch: str, out: Path, force: bool = False, best_of: int = 1,
    refits: bool = False,
) -> Built:  # fmt: skip
    """Build `out` from `onnx`, or keep it when its manifest is current.

    The fastest of `best_of` builds on this machine's GPU is kept; `refits` makes its weights replaceable.
    Waits for another process that builds the same engine. Raises ToolError when the graph does not parse, is fixed
    where the contract is dynamic, does not compile, or when memory or disk is too small.
    """
    require_arch(target, backend, arch)
    if refits:
        refittable.require_possible(target, backend)
    check_graph(onnx, target)
    facts = dit_facts(onnx, target)
    settings = build_settings(target, backend, arch, facts["one_row"], refits)
    sources = [onnx, *(onnx.parent / name for name in resolve.external_data_names(onnx))]
    inputs = {file.name: _digest(file) for file in sources}
    with build(out, "engine", inputs, settings, force) as draft:
        if draft is None:
            return Built(out, 0.0, out.stat().st_size, reused=True, why=CURRENT)
        requirements_check.require_build(sum(file.stat().st_size for file in sources), out.parent)
        return _built(onnx, target, draft, best_of, facts["null_row"])


def _built(onnx: Path, target: Target, draft: Draft, best_of: int, null_row: bool) -> Built:
    """Compile the graph, then write the engine and its manifest."""
    out, backend, arch = draft.output, draft.settings["backend"], draft.settings["arch"]
    started, module = time.monotonic(), load_backend(backend)
    gates: dict[str, Any] = {
        "compiled": True, "run_on_gpu": False, "attention_lowered": lower_plugins.lowered(onnx) is not None
    }  # fmt: skip
    if target.kind == "dit":
        gates["null_row"] = null_row
    marked = refittable.weights_of(onnx) if draft.settings.get(tensorrt_refit.SETTING) else []
    # The timing cache saves timing a kernel twice. Several builds must differ, so they share no cache. A builder that
    # needs no GPU times no kernels.
    timed = best_of == 1 and not engines.BACKENDS[backend].builds_elsewhere
    cache = timing_cache.cache_path(out, backend, draft.settings["backend_version"]) if timed else None
    with _heartbeat(f"compiling {target.name} for {arch}"):
        plan = _plan(module, onnx, target, backend, arch, cache, marked)
        if best_of > 1:
            plans = [plan, *(_plan(module, onnx, target, backend, arch, None, marked) for _ in range(best_of - 1))]
            milliseconds = [timing_cache.milliseconds(module, candidate, target) for candidate in plans]
            plan = plans[milliseconds.index(min(milliseconds))]
            gates |= {"run_on_gpu": True, "milliseconds": [round(candidate, 4) for candidate in milliseconds]}
    draft.retire()
    with files.atomic_path(out) as temporary, temporary.open("wb") as stream:
        stream.write(plan)
    checks = engine_check_rows(onnx, target, out)
    seconds = time.monotonic() - started
    draft.finish([out, *checks], gates)
    return Built(out, seconds, out.stat().st_size, reused=False, why=draft.why)


def _digest(file: Path) -> str:
    """Return the SHA-256 of a source.

    Raises ToolError for a file of the hub's cache that differs from its download.
    """
    digest, expected = files.sha256_of(file), download.expected_sha256(file)
    if expected is not None and digest != expected:
        raise ToolError(
            f"{file} changed in the hub's cache after its download",
            f"delete {file.resolve()} and run the same command again",
        )
    return digest


def _plan(
    module: Any, onnx: Path, target: Target, backend: str, arch: str, cache: Path | None, marked: list[str]
) -> Any:
    """Return the serialised engine, an object with the buffer protocol; `cache` is TensorRT's timing cache.

    `marked` are the names of the refittable weights.
    """
    logger = gpu.tensorrt_logger(module)
    logger.last = ""
    builder = module.Builder(logger)
    network = builder.create_network(_strongly_typed(module))
    parser = module.OnnxParser(network, logger)
    lowered_graph = lower_plugins.lowered(onnx)
    if not (parser.parse_from_file(str(onnx)) if lowered_graph is None else parser.parse(lowered_graph, str(onnx))):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or logger.last
        raise ToolError(f"{backend} cannot parse {onnx}: {reasons}", f"rebuild the graph: {target.produced_by}")
    config = builder.create_builder_config()
    if marked:
        refittable.mark(module, network, config, marked)
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # needed by --engine-report
    if cache is not None:
        timing_cache.read_cache(config, cache)
    if engines.BACKENDS[backend].builds_elsewhere:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(module.ComputeCapability, arch.upper().replace("_", "")), 0)
    _add_profile(module, builder, network, config, target)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ToolError(
            f"{backend} did not compile {onnx.name} for {arch}: {logger.last or 'the builder logged no error'}",
            f"check that the graph was made by {target.produced_by.split()[1]}, and free memory and disk space",
        )
    if cache is not None:
        timing_cache.write_cache(config, cache)
    return plan


def _strongly_typed(module: Any) -> int:
    """Return the network flags for strong typing; TensorRT 11 has no such flag, because it has no other mode."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _add_profile(
    module: Any,
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    target: Target,
) -> None:
    """Add the contract's optimization profile; a graph with a fixed batch keeps it."""
    contract = shapes.CONTRACTS[target.kind]
    profile = builder.create_optimization_profile()
    inputs_by_name = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    dynamic = False
    for spec in contract.inputs:
        tensor = inputs_by_name[spec.name]
        axes = tuple(tensor.shape[axis] for axis in range(len(tensor.shape)))
        if -1 not in axes:
            continue
        dynamic = True
        low, middle, high = (
            module.Dims(
                [
                    fixed if fixed != -1 else limit
                    for fixed, limit in zip(axes, contract.shapes(spec, bound), strict=True)
                ]
            )
            for bound in ("min", "opt", "max")
        )
        profile.set_shape(spec.name, low, middle, high)
    if dynamic:
        config.add_optimization_profile(profile)


@contextmanager
def _heartbeat(label: str) -> Iterator[None]:
    """Print a line on stderr at intervals while the builder runs, because it reports no progress."""
    import sys

    done = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not done.wait(HEARTBEAT_SECONDS):
            print(f"{label}: {format_seconds(time.monotonic() - started)}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
