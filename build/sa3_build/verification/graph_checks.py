"""Compare a converted graph with its source by running both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sa3_build.verification import parity
from sa3_trt_core.errors import GateError
from sa3_trt_core.shapes import CONTRACTS

# A source that was mixed otherwise differs by its own rounding: 0.9998 with one kind of softmax against the other.
MIN_COSINE = 0.999

EXACT_SECONDS = 30.0  # 30 / 384 is exact in 16 bits: there a source with a 16-bit duration path is right

MAX_ROW_DIFFERENCE = 2e-3  # relative L2: 16-bit products round another way at another size

ROWS_FRAMES = 17


def require_same_network(source: Path, adopted: Path) -> float:
    """Compare a graph with what was made of it, where the source itself is right; returns the worst denoised cosine.

    Raises GateError.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    sides = []
    for path in (source, adopted):
        with OnnxRuntimeEngine(path, low_memory=True) as engine:
            sides.append(parity.denoise_rows(engine, _exact_rows()))
    worst = min(one.worst_cosine for one in parity.parity_by_sigma(*sides))
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
    from sa3_build.export import torch_to_onnx
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    tensors = torch_to_onnx.example_inputs("dit", batch=3, frames=ROWS_FRAMES)
    names = [spec.name for spec in CONTRACTS["dit"].inputs]
    feeds = dict(zip(names, tensors, strict=True))
    with OnnxRuntimeEngine(path, low_memory=True) as engine:
        together = engine.run(feeds)["velocity"].numpy()
        one_by_one = [engine.run({name: t[row : row + 1] for name, t in feeds.items()})["velocity"] for row in range(3)]
    worst = max(parity.relative(one.numpy(), together[row : row + 1]) for row, one in enumerate(one_by_one))
    if not worst <= MAX_ROW_DIFFERENCE:
        raise GateError(
            f"with its batch axis freed, rows differ from the same rows one by one by {worst:.2e}; nothing was written",
            "keep it at one row with --no-free-batch; report this with the graph",
        )
    return worst


def _exact_rows() -> Iterator[dict[str, np.ndarray]]:
    from sa3_build.verification.probe_rows import check_rows

    for row in check_rows():
        yield {**row, "seconds_total": np.array([EXACT_SECONDS], np.float32)}
