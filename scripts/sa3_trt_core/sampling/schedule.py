"""The noise levels of the model's own sampler, and of the published TensorRT runtime for people who compare."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SLOPE, OFFSET = 8.2, -2.0
LEGACY_SHIFTS, LEGACY_FRAMES = (0.5, 1.15), (256, 4096)  # the exponent grows from the one to the other


def sigmas(steps: int, sigma_max: float = 1.0) -> Tensor:
    """Falling noise levels, fp32 (steps + 1,): exactly sigma_max first, exactly 0 last.

    sigma(u) = sigmoid(8.2 u - 2.0) on u = 1 -> 0, ends set to 1 and 0, then times sigma_max. The 1 -> 0 grid is warped
    before it is scaled: warping a scaled grid is not monotone. Independent of the length.
    Source: the model's own generation (facts.md, section 2).
    """
    import torch

    if steps < 1:
        raise ValueError(f"a schedule needs at least 1 step, not {steps}")
    if not 0.0 < sigma_max <= 1.0:
        raise ValueError(f"sigma_max lies in (0, 1], not {sigma_max}")
    warped = torch.sigmoid(SLOPE * torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float32) + OFFSET)
    warped[0], warped[-1] = 1.0, 0.0
    return warped * sigma_max


def legacy_sigmas(steps: int, frames: int, sigma_max: float = 1.0) -> Tensor:
    """The noise levels of the published TensorRT runtime, fp32 (steps + 1,): another warp, that depends on the length.

    sigma(u) = s u / (1 + (s - 1) u) on u = sigma_max -> 0, the first set to sigma_max, where ln s goes straight from
    0.5 at 256 latent frames to 1.15 at 4096 (and on beyond either). That gives the eight steps of facts.md, section 2,
    at 646 frames to the last digit shown; at other lengths it has been compared with nothing. Below sigma_max 1 the
    second level can lie above the first: that is the published runtime's own, and why `sigmas` scales after its warp.
    """
    import torch

    (low, high), (short, long) = LEGACY_SHIFTS, LEGACY_FRAMES
    shift = math.exp(low + (high - low) * (frames - short) / (long - short))
    grid = torch.linspace(sigma_max, 0.0, steps + 1, dtype=torch.float32)
    warped = shift * grid / (1.0 + (shift - 1.0) * grid)
    warped[0] = sigma_max
    return warped
