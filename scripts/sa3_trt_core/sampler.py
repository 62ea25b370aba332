"""Ping-pong sampling: from noise to latents with one velocity a step, through any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import VelocityEngine


@dataclass(frozen=True)
class Conditioning:
    """What the DiT is told besides x and t, all fp32.

    t5_hidden (B, 256, 768), t5_mask (B, 256) of 0/1, seconds_total (B,) in seconds, local_add_cond (B, 257, L): keep
    mask and masked latent, zeros for plain text to audio (zeros are fed, never left out: its embedding has biases).
    """

    t5_hidden: Tensor
    t5_mask: Tensor
    seconds_total: Tensor
    local_add_cond: Tensor


def denoised(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The clean latent that a velocity points at: x - sigma v, for x and v (B, C, L)."""
    return x - sigma * v


def row_noise(seeds: Sequence[int], channels: int, frames: int) -> Iterator[Tensor]:
    """Endless fp32 noise (B, C, L): each row from a CPU generator of its own seed, drawn as randn(1, C, L).

    The first draw is the initial noise, then one a step. A row's sound therefore depends on its seed alone, not on its
    neighbours, the batch size or the GPU; for B = 1 it is what torch.manual_seed(seed) and torch.randn give.
    """
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    while True:
        yield torch.cat([torch.randn(1, channels, frames, generator=generator) for generator in generators])


def ping_pong(
    engine: VelocityEngine,
    noise: Iterator[Tensor],
    sigmas: Tensor,
    cond: Conditioning,
    on_step: Callable[[int, float], None] | None = None,
    start: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Latents (B, C, L) from the noise's first draw: d = x - s_i v, then x = (1 - s_{i+1}) d + s_{i+1} noise.

    The noise of the last step is drawn too, and multiplied by 0: the generator then stands where the model's own does.
    `start` (B, C, L) is what audio to audio starts from: (1 - s_0) start + s_0 noise. `kept` is what to put back after
    every step: latents (B, C, L) and a mask (B, 1, L) of 1 where. `on_step(i, sigma)` is called after each step.
    Raises ToolError when a velocity is not finite.
    Source: the model's own generation (facts.md, section 2).
    """
    import torch

    x = next(noise)
    if start is not None:
        x = (1.0 - sigmas[0]) * start + sigmas[0] * x
    for step in range(len(sigmas) - 1):
        now, after = sigmas[step], sigmas[step + 1]
        velocity = engine.velocity(x, now.expand(x.shape[0]).contiguous(), cond)
        if not bool(torch.isfinite(velocity).all()):
            raise ToolError(
                f"the DiT gave values that are not finite at sigma {float(now):.4f} (step {step + 1})",
                "the engine or its ONNX is damaged or overflows: build it again, or try --precision fp32",
            )
        x = (1.0 - after) * denoised(x, velocity, now) + after * next(noise)
        if kept is not None:
            x = torch.where(kept[1] > 0, kept[0], x)
        if on_step is not None:
            on_step(step, float(now))
    return x
