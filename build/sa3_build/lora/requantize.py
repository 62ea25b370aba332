"""Quantise merged weights again with the decisions of a finished FP8 build: its activation scales, its 16-bit products.

Weight scales are taken anew a channel. Merging onto the E4M3 codes themselves would lose every change below half a step
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

# Nearest codes are 0.026 from their source, GPTQ's 0.04 (relative L2); another model's weights are 1.4.
MAX_DEVIATION = 0.15


def requantize(
    fp8: Path,
    source: Path,
    loras: LoraSet,
    out: Path,
    bases: BasisSource,
    codes: Mapping[str, np.ndarray] | None = None,
) -> Merged:
    """Write the FP8 graph `fp8` with merged weights of `source`, the FP16-mixed graph that it was made of.

    `codes` gives E4M3 codes (out, in) in native rows of some layers; the others get the nearest. Raises ToolError when
    the two graphs hold different weights.
    """
    _, originals = find_layers(source)
    require_mergeable(originals, source, loras)
    model, layers = find_layers(fp8)
    if originals.keys() != layers.keys():
        raise ToolError(
            f"{fp8} and {source} are DiTs of different depth", "give the graph that the FP8 build was made of"
        )
    merged = Merged()
    for name in sorted(loras.layers & layers.keys()):
        _require_same(layers[name], originals[name], fp8, source)
        stored = originals[name].weight.stored.const_value
        assert stored is not None
        # Rounded as in the merged graph: codes are then those that the recipe gives for that graph.
        weight = merged_native(originals[name], loras, bases, merged).numpy().astype(stored.dtype.numpy())
        _put(layers[name], weight.astype(np.float32), (codes or {}).get(name))
    graph_io.save(model, out)
    return merged


def fitted_codes(merged_graph: Path, calibration: Path, layers: frozenset[str], work: Path) -> dict[str, np.ndarray]:
    """Return E4M3 codes (out, in) in native rows for the quantised products among `layers`, rounded by GPTQ.

    The activations are those of the merged FP16-mixed graph on the calibration rows.
    """
    model = graph_io.load(merged_graph)
    canonicalize.canonicalize(model)
    canonicalize.convert_foreign_fp16(model)
    run_passes(model, [FoldWeights(), RenameNodes()])
    clean = work / "clean.onnx"
    graph_io.save_linked(model, clean)
    _, found = find_layers(clean)
    chosen = {str(layer.node.name): layer for name, layer in found.items() if name in layers}
    whole = quantization_selection.select_linears(graph_io.load(clean))
    products = tuple(product for product in whole.quantized if product.node in chosen)
    selection = quantization_selection.Selection(products, whole.excluded, whole.token_macs_elsewhere)
    calibrated = CalibrationSet.open(calibration)
    rows = round_weights.rows_of(calibrated, representative(calibrated, round_weights.ROWS))
    round_weights.round_weights(clean, selection, rows, work)
    stored: Mapping[str, Codes] = round_weights.stored_codes(selection, work)
    return {
        chosen[product.node].name: _native_codes(chosen[product.node], stored[product.weight].read())
        for product in products
    }


def _native_codes(layer: GraphLayer, codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(layer.native_rows(codes.T if layer.weight.transposed else codes))


def _require_same(layer: GraphLayer, original: GraphLayer, fp8: Path, source: Path) -> None:
    ours, base = layer.native(), original.native()
    if ours.shape != base.shape or np.linalg.norm(ours - base) > MAX_DEVIATION * np.linalg.norm(base):
        raise ToolError(
            f"{fp8} was not made of {source}: the weights of {layer.name} differ",
            "give the FP16-mixed graph of the same build, or run build/build_dit_fp8.py on the merged graph",
        )


def _put(layer: GraphLayer, weight: np.ndarray, codes: np.ndarray | None) -> None:
    """Store a merged weight: codes and scales where the layer is quantised, else the weight in its own type."""
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
    """Store the scale of every quantizer between the weight and its product; one that others share is refused."""
    node = layer.node.inputs[1].producer() if layer.node.inputs[1] is not None else None
    while node is not None:
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            value = node.inputs[1]
            assert value is not None and value.const_value is not None
            if any(use.node.op_type not in ("DequantizeLinear", "QuantizeLinear") for use in value.uses()):
                raise ToolError(f"the weight scale of {layer.name} has other uses", "build the FP8 graph again")
            value.const_value = ir.tensor(scale.reshape(value.const_value.shape.numpy()), name=value.name)
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
