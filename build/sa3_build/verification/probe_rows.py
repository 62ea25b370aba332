"""Seeded DiT inputs at each of the 8 sigmas, for comparing two graphs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sa3_build.export import torch_to_onnx
from sa3_trt_core import shapes
from sa3_trt_core.sampling import schedule

CHECK_FRAMES = 120  # a 5 s generation


def check_rows() -> Iterator[dict[str, np.ndarray]]:
    """Yield one row of seeded noise at each of the model's 8 sigmas."""
    names = [spec.name for spec in shapes.CONTRACTS["dit"].inputs]
    for index, sigma in enumerate(schedule.sigmas(8)[:-1].tolist()):
        tensors = torch_to_onnx.example_inputs("dit", batch=1, frames=CHECK_FRAMES, seed=index)
        row = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        yield {**row, "t": np.array([sigma], np.float32)}
