"""Merge adapters into the weights of an fp32 or FP16-mixed DiT graph, in fp32; each weight is rounded once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from sa3_build.graph import io as graph_io
from sa3_build.lora.graph_layers import GraphLayer, find_layers, in_stored_layout
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.lora.svd_bases import BasisSource

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Merged:
    """Result of a merge: |W' - W| / |W| of every adapted layer."""

    changes: dict[str, float] = field(default_factory=dict)

    @property
    def mean_change(self) -> float:
        """Mean of `changes`; 0 without any."""
        return float(np.mean(list(self.changes.values()))) if self.changes else 0.0


def require_mergeable(layers: Mapping[str, GraphLayer], source: Path, loras: LoraSet) -> None:
    """Raise ToolError for a quantised graph, and for adapters that do not fit the graph."""
    if any(layer.weight.scale is not None for layer in layers.values()):
        raise ToolError(
            f"{source} is quantised: a change smaller than half a step of E4M3 would be rounded away",
            "give the FP16-mixed graph as --input and the FP8 graph as --fp8-base",
        )
    loras.require_fits({name: layer.shape for name, layer in layers.items()}, str(source))


def merge_graph(source: Path, loras: LoraSet, out: Path, bases: BasisSource) -> Merged:
    """Write `source` with merged adapters to `out` and its sidecar; every other tensor is unchanged.

    Weights are merged one at a time, when they are written. Raises ToolError and GraphNotRecognised.
    """
    model, layers = find_layers(source)
    require_mergeable(layers, source, loras)
    merged = Merged()
    for name in sorted(loras.layers & layers.keys()):
        _put_lazily(layers[name], loras, bases, merged)
    graph_io.save(model, out)
    return merged


def merged_native(layer: GraphLayer, loras: LoraSet, bases: BasisSource, merged: Merged) -> Tensor:
    """Return a layer's merged weight (out, in) fp32 in native row order; record its change in `merged`."""
    import torch

    base = torch.from_numpy(layer.native())
    weight = loras.merged(layer.name, base, bases)
    merged.changes[layer.name] = float((weight - base).norm() / base.norm().clamp(min=1e-30))
    if not bool(weight.isfinite().all()):
        raise ToolError(
            f"the merged weight of {layer.name} is not finite", "lower the strengths, or merge fewer adapters"
        )
    return weight


def _put_lazily(layer: GraphLayer, loras: LoraSet, bases: BasisSource, merged: Merged) -> None:
    value = layer.weight.stored
    stored = value.const_value
    assert stored is not None
    original = GraphLayer(layer.role, layer.node, layer.weight, layer.rows, layer.columns)
    dtype = stored.dtype.numpy()

    def merge() -> ir.TensorProtocol:
        merging, value.const_value = value.const_value, stored  # the base weight is read through the value
        try:
            rows = original.graph_rows(merged_native(original, loras, bases, merged).numpy())
            array = in_stored_layout(original, rows)
        finally:
            value.const_value = merging
        max_value = float(np.abs(array).max())
        if dtype == np.float16 and max_value > float(np.finfo(np.float16).max):
            raise ToolError(
                f"the merged weight of {original.name} reaches {max_value:g}, beyond fp16", "lower the strengths"
            )
        return ir.tensor(array.astype(dtype), name=value.name)

    value.const_value = ir.LazyTensor(
        merge, dtype=stored.dtype, shape=ir.Shape(stored.shape.numpy()), name=str(value.name)
    )
