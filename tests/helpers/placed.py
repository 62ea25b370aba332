"""What was decided about each quantised product, by what it does: comparable between graphs of two exporters."""

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
    """The graph that the FP8 recipe works on."""
    model = graph_io.load(half)
    canonicalize.adopt(model)
    canonicalize.remix(model)
    run_passes(model, [FoldWeights(), RenameNodes()])
    return model


def placed_scales(half: Path, fp8: Path) -> dict[Place, Scales]:
    """Activation scale and weight scales (N,) of every quantised product, by its place."""
    source = clean(half)
    selection = quantization_selection.select_products(source)
    found = places(source, selection)
    nodes = {str(node.name): node for node in graph_io.load(fp8).graph}
    scales = {}
    for product in selection.quantized:
        sides = [query.constant_of(side.inputs[1]) for side in quantizers.dequantizers(nodes[product.node]) if side]
        scales[found[product.node]] = (float(sides[0].reshape(())), sides[1].astype(np.float64).copy())
    return scales


def placed_amax(path: Path, scratch: Path, calibration: Path) -> dict[Place, float]:
    """The largest magnitude that enters every product of an fp32 or FP16-mixed graph, by its place."""
    model = graph_io.load(path)
    canonicalize.adopt(model)
    adopted = scratch / f"{path.parent.name}-{path.name}"
    graph_io.save(model, adopted)
    model = graph_io.load(adopted)
    selection = quantization_selection.select_products(model)
    largest = amax.measure_amax(adopted, selection, CalibrationSet.open(calibration)).max(axis=0)
    by_name = dict(zip(selection.activations, largest.tolist(), strict=True))
    found = places(model, selection)
    return {found[product.node]: by_name[product.activation] for product in selection.quantized}
