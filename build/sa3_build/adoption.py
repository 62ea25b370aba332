"""Take a DiT graph of any exporter that we know to the form that the recipes work on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sa3_build import compare
from sa3_build.passes.adopt import DropDeadCasts, InferTypes, LiftConstants
from sa3_build.passes.base import PassResult, run_passes
from sa3_build.passes.clean import SortTopologically
from sa3_build.passes.fold_shapes import FoldShapes
from sa3_build.passes.free_batch import FreeBatch
from sa3_build.passes.islands import find_dit_islands
from sa3_build.passes.lift import LiftToSingle, reasons_to_lift
from sa3_build.passes.mixed import MixPrecision
from sa3_build.passes.opset import ConvertOpset
from sa3_trt_core.errors import GateError
from sa3_trt_core.shapes import CONTRACTS

# A source that was mixed otherwise differs by its own rounding: 0.9998 with one kind of softmax against the other.
MIN_COSINE = 0.999
EXACT_SECONDS = 30.0  # 30 / 384 is exact in 16 bits: there a source with a 16-bit duration path is right
MAX_ROW_DIFFERENCE = 2e-3  # relative L2: 16-bit products round another way at another size
ROWS_FRAMES = 17
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


def require_same_network(source: Path, adopted: Path) -> float:
    """Compare a graph with what was made of it, where the source itself is right; returns the worst denoised cosine.

    Raises GateError.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    sides = []
    for path in (source, adopted):
        with OnnxRuntimeEngine(path, low_memory=True) as engine:
            sides.append(compare.denoise_rows(engine, _exact_rows()))
    worst = min(one.worst_cosine for one in compare.parity_by_sigma(*sides))
    if not worst >= MIN_COSINE:
        raise GateError(
            f"{source.name} mixed again is another network: worst denoised cosine {worst:.6f}; nothing was written",
            "make the FP16-mixed DiT of an fp32 one: build/build_dit_fp16mixed.py; report this with the graph",
        )
    return worst


def require_rows_alike(path: Path) -> float:
    """Compare three rows in one run with the same rows one by one; returns the largest relative difference.

    Raises GateError.
    """
    from sa3_build import export
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    tensors = export.example_inputs("dit", batch=3, frames=ROWS_FRAMES)
    names = [spec.name for spec in CONTRACTS["dit"].inputs]
    feeds = dict(zip(names, tensors, strict=True))
    with OnnxRuntimeEngine(path, low_memory=True) as engine:
        together = engine.run(feeds)["velocity"].numpy()
        one_by_one = [engine.run({name: t[row : row + 1] for name, t in feeds.items()})["velocity"] for row in range(3)]
    worst = max(compare.relative(one.numpy(), together[row : row + 1]) for row, one in enumerate(one_by_one))
    if not worst <= MAX_ROW_DIFFERENCE:
        raise GateError(
            f"with its batch axis freed, rows differ from the same rows one by one by {worst:.2e}; nothing was written",
            "keep it at one row with --no-free-batch; report this with the graph",
        )
    return worst


def _exact_rows() -> Iterator[dict[str, np.ndarray]]:
    from sa3_build.half_recipe import check_rows

    for row in check_rows():
        yield {**row, "seconds_total": np.array([EXACT_SECONDS], np.float32)}
