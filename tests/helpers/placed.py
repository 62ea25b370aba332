"""What was decided about each quantised product, by what it does: comparable between graphs of two exporters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from sa3_build import adoption, graph, ptq
from sa3_build.passes.base import run_passes
from sa3_build.passes.clean import FoldWeights, RenameNodes
from sa3_build.product_kinds import Place, places
from sa3_trt_core.calib import CalibrationSet

Scales = tuple[float, np.ndarray]


def clean(half: Path) -> ir.Model:
    """The graph that the FP8 recipe works on."""
    model = graph.load(half)
    adoption.adopt(model)
    adoption.remix(model)
    run_passes(model, [FoldWeights(), RenameNodes()])
    return model


def placed_scales(half: Path, fp8: Path) -> dict[Place, Scales]:
    """Activation scale and weight scales (N,) of every quantised product, by its place."""
    source = clean(half)
    selection = ptq.select_products(source)
    found = places(source, selection)
    nodes = {str(node.name): node for node in graph.load(fp8).graph}
    scales = {}
    for product in selection.quantized:
        sides = [graph.constant_of(side.inputs[1]) for side in ptq.dequantizers(nodes[product.node]) if side]
        scales[found[product.node]] = (float(sides[0].reshape(())), sides[1].astype(np.float64).copy())
    return scales


def placed_amax(path: Path, scratch: Path, calibration: Path) -> dict[Place, float]:
    """The largest magnitude that enters every product of an fp32 or FP16-mixed graph, by its place."""
    model = graph.load(path)
    adoption.adopt(model)
    adopted = scratch / f"{path.parent.name}-{path.name}"
    graph.save(model, adopted)
    model = graph.load(adopted)
    selection = ptq.select_products(model)
    largest = ptq.measure_amax(adopted, selection, CalibrationSet.open(calibration)).max(axis=0)
    by_name = dict(zip(selection.activations, largest.tolist(), strict=True))
    found = places(model, selection)
    return {found[product.node]: by_name[product.activation] for product in selection.quantized}
