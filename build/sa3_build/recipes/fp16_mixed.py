"""FP16-mixed recipe: convert an fp32 DiT, check the ONNX, compare it with the source, then move it into place."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from sa3_build.graph import contract, io as graph_io
from sa3_build.graph.check_row_files import write_check_rows
from sa3_build.graph.errors import GraphNotRecognised, described, naming
from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.passes.base import PassResult, run_passes
from sa3_build.passes.canonicalize import canonicalize
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.fp16_mixed import MixPrecision
from sa3_build.passes.null_row import has_null_row
from sa3_build.passes.rewrites import passes_of
from sa3_build.passes.shaping import Shaping
from sa3_build.verification import graph_proof, parity as verification_parity
from sa3_build.verification.graph_checks import require_rows_alike
from sa3_build.verification.probe_rows import check_rows
from sa3_trt_core.artifacts.build import Draft, build
from sa3_trt_core.artifacts.files import sha256_of
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.errors import GateError, ToolError

SHAPED = Shaping()
HINT = "pass it to build/build_dit_fp8.py without this step, or give the fp32 dit.onnx"


@dataclass(frozen=True)
class MixedResult:
    """Result of a conversion: counts, the rewrites applied, worst denoised cosine, bytes written."""

    counts: dict[str, int]
    rewrites: tuple[PassResult, ...]
    worst: float
    bytes: int


def build_fp16_mixed(
    source: Path, output: Path, min_cosine: float, free_batch: bool = True, shaping: Shaping = SHAPED
) -> MixedResult | None:
    """Write the FP16-mixed version of an fp32 DiT; return None if the existing one is current.

    `free_batch` makes a batch axis that is fixed at 1 dynamic; `shaping` selects the graph rewrites. Raises ToolError
    for a graph that is not an fp32 DiT, GateError when the result differs too much from it.
    """
    model = graph_io.load(source)
    contract.require_contract(model, "dit", source)
    inputs = {file.name: sha256_of(file) for file in graph_io.files_of(source)}
    opset = model.opset_imports.get("", 0)
    settings = {"min_cosine": min_cosine, "opset": opset, "free_batch": free_batch, **asdict(shaping)}
    with build(output, "dit_fp16mixed", inputs, settings) as draft:
        return None if draft is None else _convert(model, source, draft, min_cosine, free_batch, shaping)


def _convert(
    model: ir.Model, source: Path, draft: Draft, min_cosine: float, free_batch: bool, shaping: Shaping
) -> MixedResult:
    """Convert the graph, check it, compare it with the source, then move it and its manifest into place."""
    output = draft.output
    with naming(source):
        _require_fp32(model)
        canonical = canonicalize(model, free_batch)
        results = run_passes(model, [FoldWeights(), *passes_of(shaping), MixPrecision(find_dit_islands)])
    graph_io.drop_exporter_notes(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.tmp", dir=output.parent) as scratch:
        trial = Path(scratch) / output.name
        graph_io.save(model, trial)
        try:
            onnx.checker.check_model(str(trial), full_check=True)
        except onnx.checker.ValidationError as error:
            raise ToolError(f"the converted graph is not valid ONNX ({error})", "report this with the graph") from None
        with OnnxRuntimeEngine(source, low_memory=True) as engine:
            reference = verification_parity.denoise_rows(engine, check_rows())
        with OnnxRuntimeEngine(trial, low_memory=True) as engine:
            candidate = verification_parity.denoise_rows(engine, check_rows())
        if canonical.foreign and free_batch:
            require_rows_alike(trial)
        parity = verification_parity.parity_by_sigma(reference, candidate)
        worst = min(p.worst_cosine for p in parity)
        if not worst >= min_cosine:
            raise GateError(
                f"worst denoised cosine {worst:.8f} (required >= {min_cosine:g}); nothing was written",
                "a weight may not fit 16 bits; build the fp32 engine instead, or lower --min-cosine if you know why",
            )
        gates = {
            "worst_denoised_cosine": worst,
            "parity": [asdict(p) for p in parity],
            "null_row": has_null_row(model),
            "rewrites": [{"pass": r.name, "counts": r.counts, "notes": list(r.notes)} for r in results[1:-1]],
        }
        written = graph_io.move(trial, output)
        written.append(write_check_rows(output, "dit", "fp16mixed"))
        draft.finish(written, gates)
    return MixedResult(results[-1].counts, tuple(results[1:-1]), worst, sum(file.stat().st_size for file in written))


def _require_fp32(model: ir.Model) -> None:
    """Raise GraphNotRecognised for a graph that is already FP16-mixed or quantised."""
    for node in model.graph:
        if node.op_type in graph_proof.QDQ:
            raise GraphNotRecognised(f"{described(node)}: the graph is already FP8", HINT)
    short = [name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT16]
    if short:
        raise GraphNotRecognised(f"the graph is already FP16-mixed: {short[0]} is fp16", HINT)
