"""Measure amax, the largest magnitude, of every activation in every calibration row.

An FP8 activation has one scale for the whole tensor:
    scale = headroom * amax / 448
where amax = max |x| over every calibration row, token and channel. It must be known before the engine is built, because
the scale is a constant of the graph. The maximum is taken over rows of every sigma and kind (text, in-painting,
guidance, ...): elements above headroom * amax saturate. amax is stored per row (R, A), so that the report can show the
sigma and the kind of row that determine each scale.
"""

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
    """Write amax of every candidate's activation in every row; return it by activation, sigma and kind of row."""
    amax = measure_amax(build.clean, build.candidates, build.rows)
    with files.atomic_path(build.amax) as temporary:
        np.save(temporary, amax)
    return {"rows": len(amax), "amax": amax_table(amax, build.candidates, build.rows)}


def measure_amax(source: Path, selection: Selection, calibration: CalibrationSet) -> np.ndarray:
    """Return amax of every quantised activation in every row: (R, A), fp32, in the order of `selection.activations`.

    Adds one ReduceMax(Abs) output per activation to the graph, so that no activation is fetched.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    probes = {f"activation_amax_{index}": name for index, name in enumerate(selection.activations)}
    amax = np.zeros((calibration.rows, len(probes)), np.float32)
    with (
        OnnxRuntimeEngine(
            source, graph_io.with_probe_outputs(source, probes, _largest_magnitude), low_memory=True
        ) as engine,
        Progress("activation amax", calibration.rows) as progress,
    ):
        for index, row in enumerate(calibration):
            outputs = engine.run(tensors(row))
            amax[index] = [float(outputs[name]) for name in probes]
            progress.advance()
    return amax


def _largest_magnitude(value: ir.Value) -> list[ir.Node]:
    magnitude = ir.node("Abs", [value])
    largest = ir.node("ReduceMax", magnitude.outputs, {"keepdims": 0})
    as_fp32 = ir.node("Cast", largest.outputs, {"to": int(ir.DataType.FLOAT)})
    as_fp32.outputs[0].dtype, as_fp32.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
    return [magnitude, largest, as_fp32]
