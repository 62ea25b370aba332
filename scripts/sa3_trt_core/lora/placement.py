"""The source of a model with adapters: weights merged at load (torch), else a merged graph or engine on disk."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core import engines, gpu, paths, targets
from sa3_trt_core.errors import ToolError
from sa3_trt_core.hub import resolve
from sa3_trt_core.lora.lora_set import LoraSet

if TYPE_CHECKING:
    from sa3_trt_core.model_loader import Plan

MERGED_AT_LOAD = ("torch",)  # backends whose weights can be replaced while they are loaded


def plan_with(plan: Plan, loras: LoraSet) -> Plan:
    """Return the plan of a model with a set of adapters; an empty set gives the model without any.

    Raises ToolError with the commands that make what is missing.
    """
    base = base_target(plan.targets["dit"])
    target, backend = base, plan.backends["dit"]
    if loras and backend not in MERGED_AT_LOAD:
        target = targets.with_loras(base, loras.digest)
        if not _is_there(plan, target, backend):
            raise ToolError(
                f"no {target.name} for {backend}: adapters are merged into the graph before it is run",
                f"make it: {' && '.join(commands(plan, loras))}",
            )
    return replace(plan, targets={**plan.targets, "dit": target})


def base_target(target: targets.Target) -> targets.Target:
    """Return the target without adapters that a target with them was derived from."""
    return targets.find_target(target.name.partition(targets.LORA_MARK)[0])


def merge_source(plan: Plan) -> tuple[Path, str]:
    """Return the packed FP16-mixed engine that the torch backend merges from, and the command that builds it."""
    target = base_target(plan.targets["dit"])
    assert target.dit is not None
    half = targets.dit_target(target.dit, "fp16mixed")
    arch = gpu.current_arch() or paths.NO_GPU
    return paths.engine_path(plan.models_dir, arch, half, "torch"), engines.rebuild_command(half.name, "torch", arch)


def commands(plan: Plan, loras: LoraSet) -> list[str]:
    """Return the commands that make the graph of a set of adapters and, where it needs one, its engine."""
    target, backend = base_target(plan.targets["dit"]), plan.backends["dit"]
    root = plan.onnx_root or Path("ROOT")
    source = targets.dit_target(target.dit, "fp16mixed") if target.precision == "fp8" and target.dit else target
    words = ["python", "build/merge_lora.py", "--input", str(_graph(root, source))]
    for adapter, strength in loras.adapters:
        words += ["--lora", f"{_named(adapter.path)}:{strength:g}"]
    options = loras.options
    words += ["--lora-rule", options.rule] if options.rule != "native" else []
    words += ["--lora-stacking", options.stacking] if options.stacking != "chained" else []
    words += [] if options.duration else ["--lora-no-duration"]
    words += ["--lora-partial"] if options.partial else []
    words += ["--fp8-base", str(_graph(root, target))] if target.precision == "fp8" else []
    lines = [shlex.join(words)]
    if backend != "onnxruntime":
        built = engines.rebuild_command(f"{target.name}{targets.LORA_MARK}{loras.digest}", backend, _arch())
        lines.append(f"{built} --onnx-root {root} --models-dir {plan.models_dir}")
    return lines


def _is_there(plan: Plan, target: targets.Target, backend: str) -> bool:
    if backend != "onnxruntime":
        return paths.engine_path(plan.models_dir, _arch(), target, backend).is_file()
    return plan.onnx_root is not None and resolve.local_onnx(plan.onnx_root, target) is not None


def _graph(root: Path, target: targets.Target) -> Path:
    return resolve.local_onnx(root, target) or root / target.onnx[0]


def _named(path: Path) -> Path:
    """A PEFT folder is named by itself, or its settings would not be found."""
    return path.parent if path.name == "adapter_model.safetensors" else path


def _arch() -> str:
    return gpu.current_arch() or "ARCH"
