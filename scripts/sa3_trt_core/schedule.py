"""The noise levels of the model's own sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SLOPE, OFFSET = 8.2, -2.0


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
