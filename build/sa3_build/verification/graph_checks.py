"""Compare a converted graph with its source by running both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sa3_build.verification import parity
from sa3_trt_core.errors import GateError
from sa3_trt_core.shapes import CONTRACTS

# A source of another FP16 recipe rounds differently: 0.9998 between fp32 and fp16 softmax.
MIN_COSINE = 0.999

EXACT_SECONDS = 30.0  # 30 / 384 is exact in 16 bits, so a 16-bit duration path has no error there

MAX_ROW_DIFFERENCE = 2e-3  # relative L2: 16-bit GEMMs round differently at other batch sizes

ROWS_FRAMES = 17


def require_same_network(source: Path, converted: Path) -> float:
    """Return the worst denoised cosine between a graph and its conversion, on rows where the source is exact.

    Raises GateError under MIN_COSINE.
    """
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    denoised = []
    for path in (source, converted):
        with OnnxRuntimeEngine(path, low_memory=True) as engine:
            denoised.append(parity.denoise_rows(engine, _exact_rows()))
    worst = min(parity_at_sigma.worst_cosine for parity_at_sigma in parity.parity_by_sigma(*denoised))
    if not worst >= MIN_COSINE:
        raise GateError(
            f"{source.name} changed when its precision was converted (cosine {worst:.6f}); nothing was written",
            "make the FP16-mixed DiT of an fp32 one: build/build_dit_fp16mixed.py; report this with the graph",
        )
    return worst


def require_rows_alike(path: Path) -> float:
    """Return the largest relative difference between three rows in one batch and the same rows run one by one.

    Raises GateError above MAX_ROW_DIFFERENCE.
    """
    from sa3_build.export import torch_to_onnx
    from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine

    tensors = torch_to_onnx.example_inputs("dit", batch=3, frames=ROWS_FRAMES)
    names = [spec.name for spec in CONTRACTS["dit"].inputs]
    feeds = dict(zip(names, tensors, strict=True))
    with OnnxRuntimeEngine(path, low_memory=True) as engine:
        batched = engine.run(feeds)["velocity"].numpy()
        single = [engine.run({name: t[row : row + 1] for name, t in feeds.items()})["velocity"] for row in range(3)]
    worst = max(parity.relative(velocity.numpy(), batched[row : row + 1]) for row, velocity in enumerate(single))
    if not worst <= MAX_ROW_DIFFERENCE:
        raise GateError(
            f"with a dynamic batch axis, batched rows differ from single rows by {worst:.2e}; nothing was written",
            "keep it at one row with --no-free-batch; report this with the graph",
        )
    return worst


def _exact_rows() -> Iterator[dict[str, np.ndarray]]:
    from sa3_build.verification.probe_rows import check_rows

    for row in check_rows():
        yield {**row, "seconds_total": np.array([EXACT_SECONDS], np.float32)}
