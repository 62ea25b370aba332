"""Take a DiT graph of any exporter that we know to the form that the recipes work on."""

from __future__ import annotations

import onnx_ir as ir

from sa3_build.passes.adopt import DropDeadCasts, InferTypes, LiftConstants
from sa3_build.passes.base import PassResult, run_passes
from sa3_build.passes.clean import SortTopologically
from sa3_build.passes.islands import find_dit_islands
from sa3_build.passes.lift import LiftToSingle, reasons_to_lift
from sa3_build.passes.mixed import MixPrecision
from sa3_build.passes.opset import ConvertOpset

NAMED = 3  # reasons that are spelled out in the report; the others are counted


def adopt(model: ir.Model) -> list[PassResult]:
    """Order, opset, constants, types and casts. Changes nothing in a graph that build/export_onnx.py made.

    Raises GraphNotRecognised naming the node.
    """
    return run_passes(model, [SortTopologically(), ConvertOpset(), LiftConstants(), InferTypes(), DropDeadCasts()])


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
