"""Take a DiT graph of any exporter that we know to the form that the recipes work on."""

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
from sa3_build.passes.pad_k import odd_products
from sa3_build.passes.remove_casts import DropDeadCasts
from sa3_build.passes.rewrites import passes_of
from sa3_build.passes.shaping import Shaping
from sa3_build.passes.stack_attention import count_pairs
from sa3_build.passes.topological_sort import SortTopologically
from sa3_build.passes.widen_fp16 import LiftToSingle, reasons_to_lift

SHAPED = Shaping()
NAMED = 3  # reasons that are spelled out in the report; the others are counted


@dataclass(frozen=True)
class Adopted:
    """What was done to a graph before any recipe, and whether it is another exporter's."""

    results: list[PassResult]
    foreign: bool


def adopt(model: ir.Model, free_batch: bool = True) -> Adopted:
    """Order, names of axes, opset, constants, types, casts, batch axis and fixed sizes.

    Changes nothing in a graph that build/export_onnx.py made. Raises GraphNotRecognised naming the node.
    """
    order = run_passes(model, [SortTopologically()])
    results = run_passes(
        model, [NameAxes(), ConvertOpset(), LiftConstants(), LowerFused(), InferTypes(), DropDeadCasts()]
    )
    if free_batch:
        results += run_passes(model, [FreeBatch()])
    foreign = any(count for result in results for count in result.counts.values())
    if foreign:
        results += run_passes(model, [FoldShapes()])
    return Adopted(order + results, foreign)


def remix(model: ir.Model, shaping: Shaping = SHAPED) -> list[PassResult]:
    """Make an adopted FP16-mixed graph of another recipe one of ours: lift it to fp32, rewrite it and mix it again.

    Does nothing to a graph whose islands are fp32, whose attention core is one type and which has nothing left to
    rewrite. Raises GraphNotRecognised.
    """
    reasons = [*reasons_to_lift(model, find_dit_islands(model)), *reasons_to_rewrite(model, shaping)]
    if not reasons:
        return []
    lifted, *rewritten, mixed = run_passes(
        model, [LiftToSingle(), FoldWeights(), *passes_of(shaping), MixPrecision(find_dit_islands)]
    )
    more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
    return [PassResult(lifted.name, lifted.counts, (*reasons[:NAMED], *more)), *rewritten, mixed]


def reasons_to_rewrite(model: ir.Model, shaping: Shaping) -> list[str]:
    """The rewritings that are switched on and that a graph lacks, each as a reason to lift it; none changes it here."""
    behind = query.graph_inputs_behind(model)
    trig = [node for node in model.graph if node.op_type in TRIG and not behind[node]]
    found = []
    if shaping.null_row and cross_tokens(model) is not None and not has_null_row(model):
        found.append("it has no rule for the null row of guidance")
    if shaping.bake_rope and trig:
        found.append(f"{described(trig[0])} and {len(trig) - 1} more compute a rotary table at every run")
    if shaping.stack_attention and (pairs := count_pairs(model)):
        found.append(f"{pairs} pairs of attention calls are two calls each")
    if shaping.pad_k and (odd := odd_products(model)):
        found.append(f"{described(odd[0])} has a K that is no multiple of 16")
    return found
