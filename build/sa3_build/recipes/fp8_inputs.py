"""Input graph of the FP8 recipe: checks before anything is written, and conversion to the form that the stages need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sa3_build.graph import io as graph_io
from sa3_build.graph.errors import naming
from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.passes import canonicalize
from sa3_build.passes.base import run_passes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.null_row import has_null_row
from sa3_build.passes.rename_nodes import RenameNodes
from sa3_build.passes.shaping import Shaping
from sa3_build.quantization import selection
from sa3_build.quantization.settings import QuantizationSettings
from sa3_build.quantization.workspace import Workspace
from sa3_build.recipes import requirements_check
from sa3_build.verification import graph_checks, graph_proof
from sa3_trt_core.errors import ToolError


def require_fp16_mixed(
    model: ir.Model, source: Path, free_batch: bool = True, shaping: Shaping = canonicalize.SHAPED
) -> None:
    """Raise ToolError naming the file, before anything is written, for a graph that is not an FP16-mixed DiT."""
    if any(node.op_type in graph_proof.QDQ for node in model.graph):
        raise ToolError(f"{source} is already quantised", "give the FP16-mixed DiT that it was made from")
    with naming(source):
        canonicalize.canonicalize(model, free_batch)
        find_dit_islands(model)
        trunk = {linear.weight for linear in selection.select_linears(model).quantized}
    fp32_weights = [name for name in sorted(trunk) if model.graph.initializers[name].dtype != ir.DataType.FLOAT16]
    if fp32_weights:
        name = fp32_weights[0]
        raise ToolError(
            f"{source} is not FP16-mixed: weight {name} is {model.graph.initializers[name].dtype}",
            "make the FP16-mixed DiT first: build/build_dit_fp16mixed.py",
        )
    with naming(source):
        canonicalize.convert_foreign_fp16(model, shaping)


def needs_of(model: ir.Model, source: Path, settings: QuantizationSettings) -> requirements_check.Estimate:
    """Return the memory and disk that quantising a canonicalised DiT requires."""
    run_passes(model, [FoldWeights()])
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    stored = [tensor for tensor in tensors.values() if tensor is not None]
    rewritten = sum(tensor.nbytes for tensor in stored if not isinstance(tensor, graph_io.StoredTensor))
    quantised = [tensors[linear.weight] for linear in selection.select_linears(model).quantized]
    total = sum(file.stat().st_size for file in graph_io.files_of(source))
    fp8_bytes = sum(tensor.nbytes for tensor in quantised if tensor is not None)
    return requirements_check.estimate(total, fp8_bytes, rewritten, settings.ptq, settings.weights, settings.rounding)


def clean(build: Workspace) -> Mapping[str, Any]:
    """Write the source sorted, folded, renamed and FP16-mixed by this project's recipe; return a report.

    A converted graph is compared with the source. Raises GraphNotRecognised naming the node, GateError when the
    conversion changed the network.
    """
    model = graph_io.load(build.source)
    canonical = canonicalize.canonicalize(model, build.settings.free_batch)
    converted = canonicalize.convert_foreign_fp16(model, build.settings.shaping)
    results = [*canonical.results, *converted, *run_passes(model, [FoldWeights(), RenameNodes()])]
    find_dit_islands(model)
    graph_io.drop_exporter_notes(model)
    graph_io.save_linked(model, build.clean)
    report: dict[str, Any] = {"passes": [result.as_dict for result in results]}
    if converted:
        report["cosine_with_source"] = graph_checks.require_same_network(build.source, build.clean)
    report["null_row"] = has_null_row(model)
    if canonical.foreign and build.settings.free_batch:
        report["batched_vs_single_rows"] = graph_checks.require_rows_alike(build.clean)
    return report
