"""In-painting: the keep mask over latent frames, and the DiT input local_add_cond.

Shared by sampler, calibration, validation and scoring, so that a DiT is calibrated and evaluated on the masks that it
is run with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sa3_trt_core import shapes

if TYPE_CHECKING:
    from torch import Tensor

Ranges = Sequence[tuple[float, float]]  # (start, end) in seconds


def regenerated_frames(start: float, end: float) -> tuple[int, int]:
    """Return the first latent frame of a range in seconds, and the first frame after it; equal for an empty range.

    The model's mask is in samples, with bounds int(seconds * 44100), and is sampled at the first sample of each frame:
    frame i is regenerated where start <= 4096 i < end. Source: the model's own generation.
    """
    return shapes.frames_before(start), shapes.frames_before(end)


def keep_mask(seconds: float, frames: int, ranges: Ranges) -> Tensor:
    """Return the keep mask (1, 1, frames) fp32: 1 where the sound is kept, 0 in the ranges and after `seconds`.

    Nothing is kept after the end of the sound: the model is trained without context in its padding.
    """
    import torch

    keep = torch.zeros(1, 1, frames)
    keep[..., : shapes.frames_before(seconds)] = 1.0
    for start, end in ranges:
        first, last = regenerated_frames(start, end)
        keep[..., first:last] = 0.0
    return keep


def local_conditioning(latents: Tensor, keep: Tensor) -> Tensor:
    """Return local_add_cond (B, 257, L): the keep mask (B, 1, L), then the latents (B, 256, L) where they are kept."""
    import torch

    return torch.cat([keep, keep * latents], dim=1)
