"""Convert a DiT graph of any supported exporter to the form that the recipes require."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sa3_build.graph import query
from sa3_build.graph.errors import described
from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.passes.bake_rope import TRIG
from sa3_build.passes.base import PassResult, run_passes
from sa3_build.passes.convert_opset import ConvertOpset
from sa3_build.passes.dynamic_batch import FreeBatch
from sa3_build.passes.fold_shapes import FoldShapes
from sa3_build.passes.fold_weights import FoldWeights
from sa3_build.passes.fp16_mixed import MixPrecision
from sa3_build.passes.infer_types import InferTypes
from sa3_build.passes.lift_constants import LiftConstants
from sa3_build.passes.lower_fused import LowerFused
from sa3_build.passes.name_axes import NameAxes
from sa3_build.passes.null_row import cross_tokens, has_null_row
from sa3_build.passes.pad_k import unaligned_linears
from sa3_build.passes.remove_casts import DropDeadCasts
from sa3_build.passes.rewrites import passes_of
from sa3_build.passes.shaping import Shaping
from sa3_build.passes.stack_attention import count_pairs
from sa3_build.passes.topological_sort import SortTopologically
from sa3_build.passes.widen_fp16 import WidenFp16, fp16_mismatches

SHAPED = Shaping()
NAMED = 3  # reasons written to the report in full; the others are counted


@dataclass(frozen=True)
class Canonicalized:
    """Pass results of a canonicalised graph, and whether another exporter wrote it."""

    results: list[PassResult]
    foreign: bool


def canonicalize(model: ir.Model, free_batch: bool = True) -> Canonicalized:
    """Convert a graph's node order, axis names, opset, constants, types, casts, batch axis and fixed sizes.

    Does not change a graph of build/export_onnx.py. Raises GraphNotRecognised naming the node.
    """
    sorting = run_passes(model, [SortTopologically()])
    results = run_passes(
        model, [NameAxes(), ConvertOpset(), LiftConstants(), LowerFused(), InferTypes(), DropDeadCasts()]
    )
    if free_batch:
        results += run_passes(model, [FreeBatch()])
    foreign = any(count for result in results for count in result.counts.values())
    if foreign:
        results += run_passes(model, [FoldShapes()])
    return Canonicalized(sorting + results, foreign)


def convert_foreign_fp16(model: ir.Model, shaping: Shaping = SHAPED) -> list[PassResult]:
    """Convert a canonicalised FP16-mixed graph of another recipe: widen it to fp32, rewrite and mix it again.

    Does nothing to a graph whose islands are fp32, whose attention core has one type and which lacks no rewrite. Raises
    GraphNotRecognised.
    """
    reasons = [*fp16_mismatches(model, find_dit_islands(model)), *missing_rewrites(model, shaping)]
    if not reasons:
        return []
    widened, *rewritten, mixed = run_passes(
        model, [WidenFp16(), FoldWeights(), *passes_of(shaping), MixPrecision(find_dit_islands)]
    )
    more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
    return [PassResult(widened.name, widened.counts, (*reasons[:NAMED], *more)), *rewritten, mixed]


def missing_rewrites(model: ir.Model, shaping: Shaping) -> list[str]:
    """Return the enabled rewrites that a graph lacks, one sentence each; the graph is not changed."""
    dependencies = query.input_dependencies(model)
    trig = [node for node in model.graph if node.op_type in TRIG and not dependencies[node]]
    reasons = []
    if shaping.null_row and cross_tokens(model) is not None and not has_null_row(model):
        reasons.append("guidance's null row is not implemented")
    if shaping.bake_rope and trig:
        reasons.append(f"{described(trig[0])} and {len(trig) - 1} more compute a rotary table in every run")
    if shaping.stack_attention and (pairs := count_pairs(model)):
        reasons.append(f"{pairs} pairs of attention calls are not stacked")
    if shaping.pad_k and (unaligned := unaligned_linears(model)):
        reasons.append(f"{described(unaligned[0])} has a K that is not a multiple of 16")
    return reasons
