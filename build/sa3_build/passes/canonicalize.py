"""Take a DiT graph of any exporter that we know to the form that the recipes work on."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sa3_build.graph.fp32_islands import find_dit_islands
from sa3_build.passes.base import PassResult, run_passes
from sa3_build.passes.convert_opset import ConvertOpset
from sa3_build.passes.dynamic_batch import FreeBatch
from sa3_build.passes.fold_shapes import FoldShapes
from sa3_build.passes.fp16_mixed import MixPrecision
from sa3_build.passes.infer_types import InferTypes
from sa3_build.passes.lift_constants import LiftConstants
from sa3_build.passes.remove_casts import DropDeadCasts
from sa3_build.passes.topological_sort import SortTopologically
from sa3_build.passes.widen_fp16 import LiftToSingle, reasons_to_lift

NAMED = 3  # reasons that are spelled out in the report; the others are counted


@dataclass(frozen=True)
class Adopted:
    """What was done to a graph before any recipe, and whether its batch axis was freed."""

    results: list[PassResult]
    freed: bool


def adopt(model: ir.Model, free_batch: bool = True) -> Adopted:
    """Order, opset, constants, types, casts, batch axis and fixed sizes.

    Changes nothing in a graph that build/export_onnx.py made. Raises GraphNotRecognised naming the node.
    """
    order = run_passes(model, [SortTopologically()])
    results = run_passes(model, [ConvertOpset(), LiftConstants(), InferTypes(), DropDeadCasts()])
    if free_batch:
        results += run_passes(model, [FreeBatch()])
    freed = bool(free_batch and results[-1].counts["freed"])
    if any(count for result in results for count in result.counts.values()):  # of another exporter
        results += run_passes(model, [FoldShapes()])
    return Adopted(order + results, freed)


def remix(model: ir.Model) -> list[PassResult]:
    """Make an adopted FP16-mixed graph of another recipe one of ours: lift it to fp32 and mix it again.

    Does nothing to a graph whose islands are fp32 and whose attention core is one type. Raises GraphNotRecognised.
    """
    reasons = reasons_to_lift(model, find_dit_islands(model))
    if not reasons:
        return []
    lifted, mixed = run_passes(model, [LiftToSingle(), MixPrecision(find_dit_islands)])
    more = [f"and {len(reasons) - NAMED} more"] if len(reasons) > NAMED else []
    return [PassResult(lifted.name, lifted.counts, (*reasons[:NAMED], *more)), mixed]
