"""Measure what each rewriting of a DiT's shape does: nodes, bytes, parity with the fp32 graph and time of a forward."""

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

HEADER = ("passes", "nodes", "products", "softmaxes", "norms", "bytes", "worst denoised cosine", "ms a forward")
FRAMES = 646  # 54 s
RUNS = 5


@dataclass(frozen=True)
class ShapeCost:
    """One row of the table. Cosine: of the denoised latent with the fp32 graph's, worst of 8 sigmas."""

    name: str
    nodes: int
    products: int
    softmaxes: int
    norms: int
    bytes: int
    worst: float
    milliseconds: float

    def cells(self) -> list[str]:
        """As the table shows it."""
        counts = [str(count) for count in (self.nodes, self.products, self.softmaxes, self.norms, self.bytes)]
        return [self.name, *counts, f"{self.worst:.8f}", f"{self.milliseconds:.0f}"]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="bench_shape.py", description=__doc__)
    line.add_argument("--input", type=Path, required=True, metavar="dit.onnx", help="an fp32 DiT graph")
    line.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return line


def measured(source: Path, path: Path, name: str, shaping: Shaping) -> ShapeCost:
    """Build the FP16-mixed DiT at `path` with these passes and measure it: one row, 646 frames, the best of 5 runs.

    Raises ToolError and GateError as the build does.
    """
    from sa3_build.export import torch_to_onnx
    from sa3_build.graph import io as graph_io, query
    from sa3_build.recipes.fp16_mixed import build_fp16_mixed
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
    from sa3_trt_core.shapes import CONTRACTS

    made = build_fp16_mixed(source, path, 0.0, shaping=shaping)
    assert made is not None, "an artefact was there already"
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
    products = sum(kind in query.GEMM_OPS for kind in kinds)
    best = min(seconds) * 1000
    return ShapeCost(
        name, len(kinds), products, kinds.count("Softmax"), made.counts["norms"], made.bytes, made.worst, best
    )


def main(argv: list[str] | None = None) -> int:
    """Build the FP16-mixed DiT with no pass, with each alone and with all; nothing is kept."""
    args = parser().parse_args(argv)

    from sa3_build.passes.shaping import Shaping
    from sa3_trt_core import console

    names = [field.name for field in fields(Shaping)]
    variants = {"none": Shaping(**dict.fromkeys(names, False))}
    variants |= {name.replace("_", "-"): Shaping(**{one: one == name for one in names}) for name in names}
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
