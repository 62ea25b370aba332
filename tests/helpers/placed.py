"""Scales and amax of each quantised product by its role in the network, so that graphs of two exporters compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from sa3_build.graph import io as graph_io, quantizers, query
from sa3_build.passes import canonicalize
from sa3_build.passes.base import run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.quantization import amax, selection as quantization_selection
from sa3_build.quantization.layer_roles import Place, places
from sa3_trt_core.artifacts.calibration_set import CalibrationSet

Scales = tuple[float, np.ndarray]


def clean(half: Path) -> ir.Model:
    """Return the canonical graph that the FP8 recipe quantises."""
    model = graph_io.load(half)
    canonicalize.adopt(model)
    canonicalize.remix(model)
    run_passes(model, [FoldWeights(), RenameNodes()])
    return model


def placed_scales(half: Path, fp8: Path) -> dict[Place, Scales]:
    """Return the activation scale and weight scales (N,) of every quantised product by its role."""
    source = clean(half)
    selection = quantization_selection.select_products(source)
    role_by_node = places(source, selection)
    nodes = {str(node.name): node for node in graph_io.load(fp8).graph}
    scales = {}
    for product in selection.quantized:
        constants = [
            query.constant_of(operand.inputs[1]) for operand in quantizers.dequantizers(nodes[product.node]) if operand
        ]
        scales[role_by_node[product.node]] = (float(constants[0].reshape(())), constants[1].astype(np.float64).copy())
    return scales


def placed_amax(path: Path, scratch: Path, calibration: Path) -> dict[Place, float]:
    """Return the amax of every product's activation in an fp32 or FP16-mixed graph by its role."""
    model = graph_io.load(path)
    canonicalize.adopt(model)
    canonical_path = scratch / f"{path.parent.name}-{path.name}"
    graph_io.save(model, canonical_path)
    model = graph_io.load(canonical_path)
    selection = quantization_selection.select_products(model)
    amax_by_index = amax.measure_amax(canonical_path, selection, CalibrationSet.open(calibration)).max(axis=0)
    amax_by_activation = dict(zip(selection.activations, amax_by_index.tolist(), strict=True))
    role_by_node = places(model, selection)
    return {role_by_node[product.node]: amax_by_activation[product.activation] for product in selection.quantized}
