"""What one shape of a FP16-mixed DiT costs: nodes, bytes, distance from its source and time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from sa3_build import export, graph
from sa3_build.half_recipe import build_half
from sa3_build.shaping import Shaping
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.shapes import CONTRACTS

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


def measured(source: Path, path: Path, name: str, shaping: Shaping) -> ShapeCost:
    """Build the FP16-mixed DiT at `path` with these passes and measure it: one row, 646 frames, the best of 5 runs.

    Raises ToolError and GateError as the build does.
    """
    made = build_half(source, path, 0.0, shaping=shaping)
    assert made is not None, "an artefact was there already"
    model = graph.load(path)
    kinds = [node.op_type for node in model.graph]
    names = [spec.name for spec in CONTRACTS["dit"].inputs]
    inputs = dict(zip(names, export.example_inputs("dit", batch=1, frames=FRAMES), strict=True))
    seconds = []
    with OnnxRuntimeEngine(path) as engine:
        for _ in range(RUNS):
            started = time.perf_counter()
            engine.run(inputs)
            seconds.append(time.perf_counter() - started)
    products = sum(kind in graph.PRODUCTS for kind in kinds)
    best = min(seconds) * 1000
    return ShapeCost(
        name, len(kinds), products, kinds.count("Softmax"), made.counts["norms"], made.bytes, made.worst, best
    )
