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
from sa3_build.quantization.layer_roles import LayerRole, roles_of
from sa3_trt_core.artifacts.calibration_set import CalibrationSet

Scales = tuple[float, np.ndarray]


def canonical_graph(half: Path) -> ir.Model:
    """Return the canonical graph that the FP8 recipe quantises."""
    model = graph_io.load(half)
    canonicalize.canonicalize(model)
    canonicalize.convert_foreign_fp16(model)
    run_passes(model, [FoldWeights(), RenameNodes()])
    return model


def scales_by_role(half: Path, fp8: Path) -> dict[LayerRole, Scales]:
    """Return the activation scale and weight scales (N,) of every quantised product by its role."""
    source = canonical_graph(half)
    selection = quantization_selection.select_linears(source)
    role_by_node = roles_of(source, selection)
    nodes = {str(node.name): node for node in graph_io.load(fp8).graph}
    scales = {}
    for product in selection.quantized:
        constants = [
            query.constant_of(operand.inputs[1]) for operand in quantizers.dequantizers(nodes[product.node]) if operand
        ]
        scales[role_by_node[product.node]] = (float(constants[0].reshape(())), constants[1].astype(np.float64).copy())
    return scales


def amax_by_role(path: Path, scratch: Path, calibration: Path) -> dict[LayerRole, float]:
    """Return the amax of every product's activation in an fp32 or FP16-mixed graph by its role."""
    model = graph_io.load(path)
    canonicalize.canonicalize(model)
    canonical_path = scratch / f"{path.parent.name}-{path.name}"
    graph_io.save(model, canonical_path)
    model = graph_io.load(canonical_path)
    selection = quantization_selection.select_linears(model)
    amax_by_index = amax.measure_amax(canonical_path, selection, CalibrationSet.open(calibration)).max(axis=0)
    amax_by_activation = dict(zip(selection.activations, amax_by_index.tolist(), strict=True))
    role_by_node = roles_of(model, selection)
    return {role_by_node[product.node]: amax_by_activation[product.activation] for product in selection.quantized}
