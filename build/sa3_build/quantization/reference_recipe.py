"""The published recipe's choices, for comparison only: its in-painting saturates (build/NOTES.md)."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.quantization import scales, selection
from sa3_trt_core.artifacts.calibration_set import CalibrationSet
from sa3_trt_core.number_formats import E4M3_MAX

HEADROOM = E4M3_MAX / 36  # its activation scales are amax / 36
ROWS = 16  # it calibrates again on the last rows only
# Exclusion reasons of this project that the published recipe lacks.
ALSO_QUANTIZED = ("local embedding", "latent in", "velocity out")


def select_linears(model: ir.Model) -> selection.Selection:
    """Return every weighted layer of tokens, with one scale per weight.

    Includes the local embedding, latent in and velocity out.
    """
    standard = selection.select_linears(model)
    standard_nodes = {linear.node for linear in standard.quantized}
    excluded = {node: reason for node, reason in standard.excluded.items() if reason not in ALSO_QUANTIZED}
    linears = [
        selection.linear_of(node, weight, per_channel=False)
        for node, weight in query.linear_nodes(model)
        if str(node.name) in standard_nodes or standard.excluded[str(node.name)] in ALSO_QUANTIZED
    ]
    return selection.Selection(tuple(linears), excluded, 0)


def rows_of(calibration: CalibrationSet) -> CalibrationSet:
    """Return the last ROWS rows of a set, or all of a smaller one."""
    return calibration.subset(range(max(0, calibration.rows - ROWS), calibration.rows))


def bounded(amax: np.ndarray) -> np.ndarray:
    """Return amax with zeros replaced by the smallest value whose scale is not under the floor.

    An input that no calibration row reaches has an amax of 0.
    """
    return np.maximum(amax, np.float32(scales.FP16_SCALE_FLOOR * E4M3_MAX / HEADROOM))
