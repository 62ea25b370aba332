"""Measure the effect of each graph rewrite: nodes, bytes, parity with the fp32 graph and forward time."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.cli.arguments import Parser, run_command

if TYPE_CHECKING:
    from sa3_build.passes.shaping import Shaping

HEADER = ("passes", "nodes", "GEMMs", "softmaxes", "norms", "bytes", "worst denoised cosine", "ms per forward")
FRAMES = 646  # 54 s
RUNS = 5


@dataclass(frozen=True)
class RewriteCost:
    """One row of the table; `worst` is the worst cosine of the denoised latent with the fp32 graph's, over 8 sigmas."""

    name: str
    nodes: int
    gemms: int
    softmaxes: int
    norms: int
    bytes: int
    worst: float
    milliseconds: float

    def cells(self) -> list[str]:
        """Return the table cells."""
        counts = [str(count) for count in (self.nodes, self.gemms, self.softmaxes, self.norms, self.bytes)]
        return [self.name, *counts, f"{self.worst:.8f}", f"{self.milliseconds:.0f}"]


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="bench_shape.py", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="dit.onnx", help="fp32 DiT graph")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser


def measured(source: Path, path: Path, name: str, shaping: Shaping) -> RewriteCost:
    """Build the FP16-mixed DiT at `path` with these rewrites and measure it: one row, 646 frames, best of 5 runs.

    Raises ToolError and GateError as the build does.
    """
    from sa3_build.export import torch_to_onnx
    from sa3_build.graph import io as graph_io, query
    from sa3_build.recipes.fp16_mixed import build_fp16_mixed
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
    from sa3_trt_core.shapes import CONTRACTS

    result = build_fp16_mixed(source, path, 0.0, shaping=shaping)
    assert result is not None, "the artefact exists already"
    model = graph_io.load(path)
    kinds = [node.op_type for node in model.graph]
    names = [spec.name for spec in CONTRACTS["dit"].inputs]
    inputs = dict(zip(names, torch_to_onnx.example_inputs("dit", batch=1, frames=FRAMES), strict=True))
    seconds = []
    with OnnxRuntimeEngine(path) as engine:
        for _ in range(RUNS):
            started = time.perf_counter()
            engine.run(inputs)
            seconds.append(time.perf_counter() - started)
    gemms = sum(kind in query.GEMM_OPS for kind in kinds)
    best = min(seconds) * 1000
    return RewriteCost(
        name, len(kinds), gemms, kinds.count("Softmax"), result.counts["norms"], result.bytes, result.worst, best
    )


def main(argv: list[str] | None = None) -> int:
    """Build the FP16-mixed DiT without rewrites, with each alone and with all; the graphs are deleted."""
    args = make_parser().parse_args(argv)

    from sa3_build.passes.shaping import Shaping
    from sa3_trt_core import console

    names = [field.name for field in fields(Shaping)]
    variants = {"none": Shaping(**dict.fromkeys(names, False))}
    variants |= {name.replace("_", "-"): Shaping(**{other: other == name for other in names}) for name in names}
    variants["all"] = Shaping()
    with tempfile.TemporaryDirectory(prefix="bench-shape") as scratch:
        rows = [
            measured(args.input, Path(scratch) / name / "dit.onnx", name, shaping).cells()
            for name, shaping in variants.items()
        ]
    show = console.markdown if args.markdown else console.table
    print(show(HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
