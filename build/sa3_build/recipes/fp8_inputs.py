"""The input graph of the FP8 recipe: refused before anything is written, or taken to the form that the stages need."""

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
from sa3_build.quantization.settings import Settings
from sa3_build.quantization.workspace import Workspace
from sa3_build.recipes import requirements_check
from sa3_build.verification import graph_checks, graph_proof
from sa3_trt_core.errors import ToolError


def require_half(
    model: ir.Model, source: Path, free_batch: bool = True, shaping: Shaping = canonicalize.SHAPED
) -> None:
    """Refuse, before anything is written, what is not a FP16-mixed DiT. Raises ToolError naming the file."""
    if any(node.op_type in graph_proof.QDQ for node in model.graph):
        raise ToolError(f"{source} is quantised already", "give the FP16-mixed DiT it was made from")
    with naming(source):
        canonicalize.adopt(model, free_batch)
        find_dit_islands(model)
        trunk = {product.weight for product in selection.select_products(model).quantized}
    wide = [name for name in sorted(trunk) if model.graph.initializers[name].dtype != ir.DataType.FLOAT16]
    if wide:
        raise ToolError(
            f"{source} is not FP16-mixed: weight {wide[0]} is {model.graph.initializers[wide[0]].dtype}",
            "make the FP16-mixed DiT first: build/build_dit_fp16mixed.py",
        )
    with naming(source):
        canonicalize.remix(model, shaping)


def needs_of(model: ir.Model, source: Path, settings: Settings) -> requirements_check.Estimate:
    """What quantising an adopted DiT needs of memory and disk."""
    run_passes(model, [FoldWeights()])
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    held = [tensor for tensor in tensors.values() if tensor is not None]
    rewritten = sum(tensor.nbytes for tensor in held if not isinstance(tensor, graph_io.StoredTensor))
    quantised = [tensors[product.weight] for product in selection.select_products(model).quantized]
    total = sum(file.stat().st_size for file in graph_io.files_of(source))
    in_fp8 = sum(tensor.nbytes for tensor in quantised if tensor is not None)
    return requirements_check.estimate(total, in_fp8, rewritten, settings.ptq, settings.weights, settings.rounding)


def clean(build: Workspace) -> Mapping[str, Any]:
    """Write the source sorted, folded, named and mixed as ours; a converted graph is compared with the source.

    Raises GraphNotRecognised naming the node, GateError when a conversion changed the network.
    """
    model = graph_io.load(build.source)
    adopted = canonicalize.adopt(model, build.settings.free_batch)
    remixed = canonicalize.remix(model, build.settings.shaping)
    results = [*adopted.results, *remixed, *run_passes(model, [FoldWeights(), RenameNodes()])]
    find_dit_islands(model)
    graph_io.drop_exporter_notes(model)
    graph_io.save_linked(model, build.clean)
    found: dict[str, Any] = {"passes": [result.as_dict for result in results]}
    if remixed:
        found["cosine with the source as it was mixed"] = graph_checks.require_same_network(build.source, build.clean)
    found["null row"] = has_null_row(model)
    if adopted.foreign and build.settings.free_batch:
        found["rows together against one by one"] = graph_checks.require_rows_alike(build.clean)
    return found
