"""Quantise merged weights with the decisions of a finished FP8 build: its activation scales and 16-bit layers.

Weight scales are recomputed per output channel. Merging into the E4M3 codes would lose every change below half a step
of a code, so the merged weights come from the FP16-mixed graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from sa3_build.e4m3 import E4M3, E4M3_MAX, Codes, quantized
from sa3_build.graph import io as graph_io
from sa3_build.lora.graph_layers import GraphLayer, find_layers, in_stored_layout
from sa3_build.lora.merge import Merged, merged_native, require_mergeable
from sa3_build.passes import canonicalize
from sa3_build.passes.base import run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.quantization import round_weights, scales, selection as quantization_selection
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, representative
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.lora.svd_bases import BasisSource

# Relative L2 between codes and source: 0.026 for nearest codes, 0.04 for GPTQ, 1.4 for another model's weights.
MAX_DEVIATION = 0.15


def requantize(
    fp8: Path,
    source: Path,
    loras: LoraSet,
    out: Path,
    bases: BasisSource,
    codes: Mapping[str, np.ndarray] | None = None,
) -> Merged:
    """Write the FP8 graph `fp8` with merged weights of `source`, the FP16-mixed graph that it was built from.

    `codes` has E4M3 codes (out, in) in native row order of some layers; others get the nearest codes. Raises ToolError
    when the two graphs have different weights.
    """
    _, originals = find_layers(source)
    require_mergeable(originals, source, loras)
    model, layers = find_layers(fp8)
    if originals.keys() != layers.keys():
        raise ToolError(
            f"{fp8} and {source} are DiTs of different depth", "give the graph that the FP8 build was made from"
        )
    merged = Merged()
    for name in sorted(loras.layers & layers.keys()):
        _require_same(layers[name], originals[name], fp8, source)
        stored = originals[name].weight.stored.const_value
        assert stored is not None
        # Rounded to the type of the merged graph, so that codes equal those of the recipe for that graph.
        weight = merged_native(originals[name], loras, bases, merged).numpy().astype(stored.dtype.numpy())
        _put(layers[name], weight.astype(np.float32), (codes or {}).get(name))
    graph_io.save(model, out)
    return merged


def fitted_codes(merged_graph: Path, calibration: Path, layers: frozenset[str], work: Path) -> dict[str, np.ndarray]:
    """Return E4M3 codes (out, in) in native row order, by GPTQ, for the quantised linears among `layers`.

    The activations are those of the merged FP16-mixed graph on the calibration rows.
    """
    model = graph_io.load(merged_graph)
    canonicalize.canonicalize(model)
    canonicalize.convert_foreign_fp16(model)
    run_passes(model, [FoldWeights(), RenameNodes()])
    clean = work / "clean.onnx"
    graph_io.save_linked(model, clean)
    _, all_layers = find_layers(clean)
    chosen = {str(layer.node.name): layer for name, layer in all_layers.items() if name in layers}
    candidates = quantization_selection.select_linears(graph_io.load(clean))
    linears = tuple(linear for linear in candidates.quantized if linear.node in chosen)
    selection = quantization_selection.Selection(linears, candidates.excluded, candidates.token_macs_elsewhere)
    calibration_set = CalibrationSet.open(calibration)
    rows = round_weights.rows_of(calibration_set, representative(calibration_set, round_weights.ROWS))
    round_weights.round_weights(clean, selection, rows, work)
    stored: Mapping[str, Codes] = round_weights.stored_codes(selection, work)
    return {
        chosen[linear.node].name: _native_codes(chosen[linear.node], stored[linear.weight].read()) for linear in linears
    }


def _native_codes(layer: GraphLayer, codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(layer.native_rows(codes.T if layer.weight.transposed else codes))


def _require_same(layer: GraphLayer, original: GraphLayer, fp8: Path, source: Path) -> None:
    weight, base = layer.native(), original.native()
    if weight.shape != base.shape or np.linalg.norm(weight - base) > MAX_DEVIATION * np.linalg.norm(base):
        raise ToolError(
            f"{fp8} was not built from {source}: the weights of {layer.name} differ",
            "give the FP16-mixed graph of the same build, or run build/build_dit_fp8.py on the merged graph",
        )


def _put(layer: GraphLayer, weight: np.ndarray, codes: np.ndarray | None) -> None:
    """Store a merged weight: codes and scales if the layer is quantised, else the weight in its own type."""
    value = layer.weight.stored
    assert value.const_value is not None
    dtype = value.const_value.dtype.numpy()
    rows = layer.graph_rows(weight)
    if layer.weight.scale is None:
        value.const_value = ir.tensor(in_stored_layout(layer, rows).astype(dtype), name=value.name)
        return
    per_channel = layer.weight.scale.size > 1
    amax = np.abs(rows).max(axis=1) if per_channel else np.abs(rows).max(keepdims=True).reshape(-1)
    scale = scales.stored_scale(amax / E4M3_MAX, layer.weight.scale.dtype)
    _set_scale(layer, scale)
    if dtype == ml_dtypes.float8_e4m3fn:
        chosen = quantized(rows, scale, 0) if codes is None else layer.graph_rows(codes.astype(np.float32)).astype(E4M3)
        value.const_value = ir.tensor(in_stored_layout(layer, chosen), name=value.name)
    else:
        value.const_value = ir.tensor(in_stored_layout(layer, rows).astype(dtype), name=value.name)


def _set_scale(layer: GraphLayer, scale: np.ndarray) -> None:
    """Store the scale of every quantizer between the weight and its MatMul. Raises ToolError for a shared scale."""
    node = layer.node.inputs[1].producer() if layer.node.inputs[1] is not None else None
    while node is not None:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            value = node.inputs[1]
            assert value is not None and value.const_value is not None
            if any(use.node.op_type not in ("DequantizeLinear", "QuantizeLinear") for use in value.uses()):
                raise ToolError(f"the weight scale of {layer.name} has other uses", "rebuild the FP8 graph")
            value.const_value = ir.tensor(scale.reshape(value.const_value.shape.numpy()), name=value.name)
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
