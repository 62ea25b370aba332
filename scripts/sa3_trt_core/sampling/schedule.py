"""Noise schedules: that of the model's own sampler, and that of the published TensorRT runtime for comparison."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sa3_trt_core.request import SCHEDULE_ORDERS

if TYPE_CHECKING:
    from torch import Tensor

SLOPE, OFFSET = 8.2, -2.0
LEGACY_SHIFTS, LEGACY_FRAMES = (0.5, 1.15), (256, 4096)  # ln s at the first and at the last length


def sigmas(steps: int, sigma_max: float = 1.0, order: str = SCHEDULE_ORDERS[0]) -> Tensor:
    """Return noise levels, fp32 (steps + 1,): exactly sigma_max first, exactly 0 last. Independent of the length.

    sigma(u) = sigmoid(8.2 u - 2.0). `warp-then-scale`: on u = 1 -> 0, ends set to 1 and 0, then times sigma_max; falls
    at every step. `scale-then-warp`: on u = sigma_max -> 0, ends set to sigma_max and 0, as the model's main branch and
    diffusers 0.42 have it; below sigma_max 1 the second level can be above the first. Equal at sigma_max 1.
    Source: the model's own generation.
    """
    import torch

    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, not {steps}")
    if not 0.0 < sigma_max <= 1.0:
        raise ValueError(f"sigma_max lies in (0, 1], not {sigma_max}")
    if order not in SCHEDULE_ORDERS:
        raise ValueError(f"the order is one of {', '.join(SCHEDULE_ORDERS)}, not {order!r}")
    high, scale = (1.0, sigma_max) if order == SCHEDULE_ORDERS[0] else (sigma_max, 1.0)
    warped = torch.sigmoid(SLOPE * torch.linspace(high, 0.0, steps + 1, dtype=torch.float32) + OFFSET)
    warped[0], warped[-1] = high, 0.0
    return warped * scale


def legacy_sigmas(steps: int, frames: int, sigma_max: float = 1.0) -> Tensor:
    """Return noise levels of the published TensorRT runtime, fp32 (steps + 1,): a warp that depends on the length.

    sigma(u) = s u / (1 + (s - 1) u) on u = sigma_max -> 0, the first set to sigma_max. ln s is linear in the length:
    0.5 at 256 latent frames, 1.15 at 4096, extrapolated beyond. Verified at 646 frames only: the eight steps of
    build/FACTS.md, Generation, to the last digit shown. Below sigma_max 1 the second level can be above the first, as
    in the published runtime; `sigmas` avoids this by scaling after its warp.
    """
    import torch

    (low, high), (short, long) = LEGACY_SHIFTS, LEGACY_FRAMES
    shift = math.exp(low + (high - low) * (frames - short) / (long - short))
    grid = torch.linspace(sigma_max, 0.0, steps + 1, dtype=torch.float32)
    warped = shift * grid / (1.0 + (shift - 1.0) * grid)
    warped[0] = sigma_max
    return warped
