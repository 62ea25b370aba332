"""The published recipe's choices, to compare with: never for use, its in-painting saturates (build/NOTES.md)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.quantization import scales, selection
from sa3_trt_core.artifacts.calibration_set import CalibrationSet
from sa3_trt_core.number_formats import E4M3_MAX

HEADROOM = E4M3_MAX / 36  # its activation scales are amax / 36
ROWS = 16  # it calibrates again on the last rows only
TAKEN = ("local embedding", "latent in", "velocity out")  # what it quantises and we do not


def select_products(model: ir.Model) -> selection.Selection:
    """Every weighted product of tokens, one scale a weight: the local embedding, project in and out too."""
    ours = selection.select_products(model)
    known = {product.node for product in ours.quantized}
    excluded = {node: reason for node, reason in ours.excluded.items() if reason not in TAKEN}
    products = [
        selection.product_of(node, weight, per_channel=False)
        for node, weight in query.weighted_products(model)
        if str(node.name) in known or ours.excluded[str(node.name)] in TAKEN
    ]
    return selection.Selection(tuple(products), excluded, 0)


def rows_of(calibration: CalibrationSet) -> CalibrationSet:
    """The last rows of a set, or all of a smaller one."""
    return calibration.subset(range(max(0, calibration.rows - ROWS), calibration.rows))


def bounded(amax: np.ndarray) -> np.ndarray:
    """amax with the smallest value whose scale is the floor in place of 0: an input that no row reaches gets it."""
    return np.maximum(amax, np.float32(scales.FP16_SCALE_FLOOR * E4M3_MAX / HEADROOM))
