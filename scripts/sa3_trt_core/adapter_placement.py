"""The source of a model with adapters: weights merged at load (torch), else a merged graph or engine on disk."""

from __future__ import annotations

import shlex
from pathlib import Path

from sa3_trt_core import engines, targets
from sa3_trt_core.engines.tensorrt_refit import require_refittable
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.paths import ModelSource


def target_with(
    target: targets.Target, backend: str, loras: LoraSet, source: ModelSource, refit: bool = False
) -> targets.Target:
    """Return the target to open for a DiT with adapters: the merged one, or the base if the backend merges at load.

    With `refit` it is the base, whose weights are then replaced by those of `merged_graph`. Raises ToolError with the
    commands that build missing files.
    """
    base = base_target(target)
    record = engines.BACKENDS[backend]
    if refit:
        _require_refit(base, backend, loras, source)
        return base
    if not loras or record.merges_adapters:
        return base
    merged = targets.with_loras(base, loras.digest)
    if record.suffix is None:
        there = source.onnx_root is not None and resolve.local_onnx(source.onnx_root, merged) is not None
    else:
        there = record.engine_path(source.models_dir, record.arch_here() or "ARCH", merged).is_file()
    if not there:
        raise ToolError(
            f"no {merged.name} for {backend}: adapters are merged into the graph before it is run",
            f"make it: {' && '.join(commands(base, backend, loras, source))}",
        )
    return merged


def merged_graph(base: targets.Target, loras: LoraSet, source: ModelSource) -> Path | None:
    """Return the merged graph of a target and a set of adapters under the ONNX root; None without one."""
    return None if source.onnx_root is None else resolve.local_onnx(source.onnx_root, _merged(base, loras))


def _merged(base: targets.Target, loras: LoraSet) -> targets.Target:
    return targets.with_loras(base, loras.digest)


def _require_refit(base: targets.Target, backend: str, loras: LoraSet, source: ModelSource) -> None:
    record = engines.BACKENDS[backend]
    if not record.refits:
        others = " or ".join(f"`backend={other.name}`" for other in engines.BUILT.values() if other.refits)
        what = "merges adapters into its loaded weights" if record.merges_adapters else "has no engine to refit"
        raise ToolError(f"`refit` is not supported by the {backend} backend, which {what}", f"omit it, or use {others}")
    if not loras:
        return
    if merged_graph(base, loras, source) is None:
        raise ToolError(
            f"no {_merged(base, loras).onnx[0]}: a refitted engine takes its weights from the merged graph",
            f"make it: {commands(base, backend, loras, source)[0]}",
        )
    arch = record.arch_here()
    path = record.engine_path(source.models_dir, arch, base) if arch is not None else None
    if path is not None and path.is_file():
        require_refittable(path, record.rebuild_command(base.name, arch))


def base_target(target: targets.Target) -> targets.Target:
    """Return the target without adapters that a target with them was derived from."""
    return targets.find_target(target.name.partition(targets.LORA_MARK)[0])


def merge_source(target: targets.Target, backend: str, models_dir: Path) -> tuple[Path, str]:
    """Return the FP16-mixed engine whose weights a backend merges into, and the command that builds it."""
    dit, record = base_target(target).dit, engines.BACKENDS[backend]
    assert dit is not None
    half, arch = targets.dit_target(dit, "fp16mixed"), record.arch_here()
    assert arch is not None, "an engine of this backend is open"
    return record.engine_path(models_dir, arch, half), record.rebuild_command(half.name, arch)


def commands(base: targets.Target, backend: str, loras: LoraSet, source: ModelSource) -> list[str]:
    """Return the commands that build the merged graph of a set of adapters and, if needed, its engine."""
    root = source.onnx_root or Path("ROOT")
    half = targets.dit_target(base.dit, "fp16mixed") if base.precision == "fp8" and base.dit else base
    words = ["python", "build/merge_lora.py", "--input", str(_graph(root, half))]
    for adapter, strength in loras.adapters:
        words += ["--lora", f"{_named(adapter.path)}:{strength:g}"]
    options = loras.options
    words += ["--lora-rule", options.rule] if options.rule != "native" else []
    words += ["--lora-stacking", options.stacking] if options.stacking != "chained" else []
    words += [] if options.duration else ["--lora-no-duration"]
    words += ["--lora-partial"] if options.partial else []
    words += ["--fp8-base", str(_graph(root, base))] if base.precision == "fp8" else []
    lines = [shlex.join(words)]
    record = engines.BACKENDS[backend]
    if record.suffix is not None:
        built = record.rebuild_command(f"{base.name}{targets.LORA_MARK}{loras.digest}")
        lines.append(f"{built} --onnx-root {root} --models-dir {source.models_dir}")
    return lines


def _graph(root: Path, target: targets.Target) -> Path:
    return resolve.local_onnx(root, target) or root / target.onnx[0]


def _named(path: Path) -> Path:
    """Return the path of an adapter for a command: the folder for PEFT, whose config is beside the weights."""
    return path.parent if path.name == "adapter_model.safetensors" else path
