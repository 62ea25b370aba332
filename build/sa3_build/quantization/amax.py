"""Measure the largest magnitude of every activation, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from sa3_build.graph import io as graph_io
from sa3_build.quantization.activation_ranges import amax_table
from sa3_build.quantization.selection import Selection
from sa3_build.quantization.workspace import Workspace
from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.calibration_set import CalibrationSet, tensors
from sa3_trt_core.console import Progress


def measure(build: Workspace) -> Mapping[str, Any]:
    """Write amax of every candidate's activation in every row, and return it by activation, sigma and kind of row."""
    amax = measure_amax(build.clean, build.candidates, build.rows)
    with files.atomic_path(build.amax) as temporary:
        np.save(temporary, amax)
    return {"rows": len(amax), "amax": amax_table(amax, build.candidates, build.rows)}


def measure_amax(source: Path, selection: Selection, calibration: CalibrationSet) -> np.ndarray:
    """The largest magnitude of every quantised activation in every row: (R, A), fp32, in `selection.activations` order.

    The graph gets one ReduceMax(Abs) output an activation, so that no activation is ever fetched.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    watched = {f"activation_amax_{index}": name for index, name in enumerate(selection.activations)}
    amax = np.zeros((calibration.rows, len(watched)), np.float32)
    with (
        OnnxRuntimeEngine(source, graph_io.observed(source, watched, _largest_magnitude), low_memory=True) as engine,
        Progress("activation amax", calibration.rows) as progress,
    ):
        for index, row in enumerate(calibration):
            found = engine.run(tensors(row))
            amax[index] = [float(found[name]) for name in watched]
            progress.advance()
    return amax


def _largest_magnitude(value: ir.Value) -> list[ir.Node]:
    magnitude = ir.node("Abs", [value])
    largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
    single = ir.node("Cast", largest.outputs, {"to": int(ir.DataType.FLOAT)})
    single.outputs[0].dtype, single.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
    return [magnitude, largest, single]
