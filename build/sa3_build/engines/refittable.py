"""Engines whose adaptable weights and scales can be replaced after they are built, without another build."""

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
    """Raise ToolError for a target or a machine that no refittable engine can be built for."""
    record = engines.BACKENDS[backend]
    if not record.refits:
        others = " or ".join(other.name for other in engines.BUILT.values() if other.refits)
        raise ToolError(f"--refittable is not for {backend}", f"use --backend {others}")
    if target.kind != "dit" or targets.LORA_MARK in target.name:
        raise ToolError(
            f"{target.name} cannot be built to be refitted: adapters go into a DiT without any",
            "leave --refittable away, or name sa3-m or sa3-m-fp8",
        )
    if gpu.current_arch() is None:
        raise ToolError(
            f"{record.label} compiles refittable engines on a machine with an NVIDIA GPU only, and none is visible",
            "leave --refittable away here: adapters then go into engines of their own (build/merge_lora.py)",
        )


def weights_of(onnx: Path) -> list[str]:
    """Return the initializers that adapters change in a DiT graph: weights, and the scales of quantised ones."""
    found = []
    for node in graph_io.load(onnx).graph:
        if linear_weight(node) is not None or node.op_type == "Conv":
            found += _initializers(node.inputs[1])
    return sorted(set(found))


def mark(module: Any, network: trt.INetworkDefinition, config: trt.IBuilderConfig, names: list[str]) -> None:
    """Mark weights of a parsed network as refittable, and no others. Raises ToolError for one that it does not have.

    With every weight marked (BuilderFlag.REFIT) TensorRT 11.3 may drop the bias of a product; and weights that shapes
    are computed of may not be marked.
    """
    config.set_flag(module.BuilderFlag.REFIT_INDIVIDUAL)
    missing = [name for name in names if not network.mark_weights_refittable(name)]
    if missing:
        raise ToolError(
            f"{module.__name__} does not keep {missing[0]} and {len(missing) - 1} other weights by name",
            "leave --refittable away for this graph",
        )


def _initializers(value: ir.Value | None) -> list[str]:
    """The initializer that a product's constant side is made of, and the scales of the quantizers on the way to it."""
    found: list[str] = []
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None:
            return found
        if node.op_type in ("DequantizeLinear", "QuantizeLinear") and node.inputs[1] is not None:
            found.append(str(node.inputs[1].name))
        value = node.inputs[0]
    return found if value is None else [*found, str(value.name)]
