"""Build refittable engines: weights and scales that adapters change can be replaced without another build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from sa3_build.engines.pack_weights import linear_weight
from sa3_build.graph import io as graph_io
from sa3_trt_core import engines, gpu, targets
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    import tensorrt as trt


def require_possible(target: targets.Target, backend: str) -> None:
    """Raise ToolError if no refittable engine can be built for the target, or on this machine."""
    record = engines.BACKENDS[backend]
    if not record.refits:
        others = " or ".join(other.name for other in engines.BUILT.values() if other.refits)
        raise ToolError(f"--refittable is not available with {backend}", f"use --backend {others}")
    if target.kind != "dit" or targets.LORA_MARK in target.name:
        raise ToolError(
            f"{target.name} cannot be refittable: that requires a DiT without merged adapters",
            "omit --refittable, or build sa3-m or sa3-m-fp8",
        )
    if gpu.current_arch() is None:
        raise ToolError(
            f"{record.label} compiles refittable engines only on a machine with an NVIDIA GPU",
            "omit --refittable and compile a merged graph instead (build/merge_lora.py)",
        )


def weights_of(onnx: Path) -> list[str]:
    """Return the initializers that adapters change in a DiT graph: weights, and the scales of quantised ones."""
    names = []
    for node in graph_io.load(onnx).graph:
        if linear_weight(node) is not None or node.op_type == "Conv":
            names += _initializers(node.inputs[1])
    return sorted(set(names))


def mark(module: Any, network: trt.INetworkDefinition, config: trt.IBuilderConfig, names: list[str]) -> None:
    """Mark only these weights of a parsed network as refittable. Raises ToolError for a missing one.

    BuilderFlag.REFIT would mark every weight: TensorRT 11.3 may then drop the bias of a linear layer, and weights from
    which shapes are computed must not be marked.
    """
    config.set_flag(module.BuilderFlag.REFIT_INDIVIDUAL)
    missing = [name for name in names if not network.mark_weights_refittable(name)]
    if missing:
        raise ToolError(
            f"{module.__name__} has no weight {missing[0]} in the parsed network ({len(missing)} are missing)",
            "omit --refittable for this graph",
        )


def _initializers(value: ir.Value | None) -> list[str]:
    """Return the initializer behind a linear layer's constant side, and the scales of the quantizers between them."""
    names: list[str] = []
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None:
            return names
        if node.op_type in ("DequantizeLinear", "QuantizeLinear") and node.inputs[1] is not None:
            names.append(str(node.inputs[1].name))
        value = node.inputs[0]
    return names if value is None else [*names, str(value.name)]
