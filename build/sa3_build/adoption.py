"""Take a DiT graph of any exporter that we know to the form that the recipes work on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sa3_build import compare
from sa3_build.passes.adopt import DropDeadCasts, InferTypes, LiftConstants
from sa3_build.passes.base import PassResult, run_passes
from sa3_build.passes.clean import SortTopologically
from sa3_build.passes.islands import find_dit_islands
from sa3_build.passes.lift import LiftToSingle, reasons_to_lift
from sa3_build.passes.mixed import MixPrecision
from sa3_build.passes.opset import ConvertOpset
from sa3_trt_core.errors import GateError

# A source that was mixed otherwise differs by its own rounding: 0.9998 with one kind of softmax against the other.
MIN_COSINE = 0.999
EXACT_SECONDS = 30.0  # 30 / 384 is exact in 16 bits: there a source with a 16-bit duration path is right
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


def require_same_network(source: Path, adopted: Path) -> float:
    """Compare a graph with what was made of it, where the source itself is right; returns the worst denoised cosine.

    Raises GateError.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    sides = []
    for path in (source, adopted):
        with OnnxRuntimeEngine(path) as engine:
            sides.append(compare.denoise_rows(engine, _exact_rows()))
    worst = min(one.worst_cosine for one in compare.parity_by_sigma(*sides))
    if not worst >= MIN_COSINE:
        raise GateError(
            f"{source.name} mixed again is not the same network: worst denoised cosine {worst:.6f}; nothing was written",
            "make the FP16-mixed DiT of an fp32 one: build/build_dit_fp16mixed.py; report this with the graph",
        )
    return worst


def _exact_rows() -> Iterator[dict[str, np.ndarray]]:
    from sa3_build.half_recipe import check_rows

    for row in check_rows():
        yield {**row, "seconds_total": np.array([EXACT_SECONDS], np.float32)}
