"""Insert a Q/DQ pair on both inputs of every selected linear layer, by ModelOpt or by this project's pass."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from sa3_build.graph import io as graph_io
from sa3_build.passes.base import run_passes
from sa3_build.passes.insert_qdq import InsertQuantizers
from sa3_build.quantization import modelopt
from sa3_build.quantization.workspace import Workspace


def insert_pairs(build: Workspace) -> Mapping[str, Any]:
    """Write the graph with Q/DQ pairs whose scales are not final; return the number of layers and their FP8 share."""
    selection = build.selection
    if build.settings.ptq == "modelopt":
        _by_modelopt(build)
    else:
        model = graph_io.load(build.clean)
        run_passes(model, [InsertQuantizers({linear.node: linear.channel_axis for linear in selection.quantized})])
        graph_io.save_linked(model, build.quantized)
    return {"quantized_linears": len(selection.quantized), "fp8_share_of_token_macs": selection.fp8_share}


def _by_modelopt(build: Workspace) -> None:
    scratch = modelopt.scratch_folder(build.folder)
    private_copy, written = scratch / "source.onnx", scratch / "quantized.onnx"
    graph_io.save(graph_io.load(build.clean), private_copy)
    modelopt.quantize_fp8(private_copy, written, build.selection, build.calibration)
    model = graph_io.load(written)
    graph_io.drop_exporter_notes(model)
    model.graph.sort()
    graph_io.save(model, build.quantized)
    shutil.rmtree(scratch)
