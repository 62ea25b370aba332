"""Write the clean graph with a Q/DQ pair on both sides of every selected product: by ModelOpt, or by our own pass."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from sa3_build.graph import io as graph_io
from sa3_build.passes.base import run_passes
from sa3_build.passes.insert_qdq import InsertQuantizers
from sa3_build.quantization import modelopt
from sa3_build.quantization.workspace import Workspace


def place(build: Workspace) -> Mapping[str, Any]:
    """Write the graph with its pairs, their scales not yet ours; returns how many products and which share."""
    selection = build.selection
    if build.settings.ptq == "modelopt":
        _by_modelopt(build)
    else:
        model = graph_io.load(build.clean)
        run_passes(model, [InsertQuantizers({product.node: product.channel_axis for product in selection.quantized})])
        graph_io.save_linked(model, build.quantized)
    return {"quantised products": len(selection.quantized), "fp8 share of token products": selection.fp8_share}


def _by_modelopt(build: Workspace) -> None:
    scratch = modelopt.scratch_folder(build.folder)
    private, written = scratch / "source.onnx", scratch / "quantized.onnx"
    graph_io.save(graph_io.load(build.clean), private)
    modelopt.quantize_fp8(private, written, build.selection, build.calibration)
    model = graph_io.load(written)
    graph_io.drop_exporter_notes(model)
    model.graph.sort()
    graph_io.save(model, build.quantized)
    shutil.rmtree(scratch)
