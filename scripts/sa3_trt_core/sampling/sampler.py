"""Ping-pong sampling: from noise to latents with one velocity a step, through any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import VelocityEngine


def denoised(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """The clean latent that a velocity points at: x - sigma v, for x and v (B, C, L)."""
    return x - sigma * v


def row_noise(seeds: Sequence[int], channels: int, frames: int, valid: int | None = None) -> Iterator[Tensor]:
    """Yield endless fp32 noise (B, C, V): each row from a CPU generator of its own seed, drawn as randn(1, C, L).

    `valid` is V, how many of the L `frames` the DiT runs on (None: all). The noise of the padded frames is drawn too:
    without it the noise of the valid ones would not be that of the model's own generation.
    The first draw is the initial noise, then one a step. A row's sound therefore depends on its seed alone, not on its
    neighbours, the batch size or the GPU; for B = 1 it is what torch.manual_seed(seed) and torch.randn give.
    """
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    while True:
        drawn = [torch.randn(1, channels, frames, generator=generator)[..., :valid] for generator in generators]
        yield torch.cat(drawn)


class Trajectory:
    """The ping-pong of some rows, a step at a time: `x` (B, C, L) at `sigma` waits for the velocity there.

    Starts at the noise's first draw; each step is d = x - s_i v, then x = (1 - s_{i+1}) d + s_{i+1} noise. The noise of
    the last step is drawn too, and multiplied by 0: the generator then stands where the model's own does.
    `start` (B, C, L) is what audio to audio starts from: (1 - s_0) start + s_0 noise. `kept` is what to put back after
    every step: latents (B, C, L) and a mask (B, 1, L) of 1 where.
    Source: the model's own generation (build/FACTS.md, Generation).
    """

    def __init__(
        self, noise: Iterator[Tensor], sigmas: Tensor, start: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._noise, self._sigmas, self._kept = noise, sigmas, kept
        self._finite: list[Tensor] = []  # of each step, looked at where it costs no waiting
        self.step = 0
        self.x = next(noise)
        if start is not None:
            self.x = (1.0 - sigmas[0]) * start + sigmas[0] * self.x

    @property
    def sigma(self) -> Tensor:
        """The noise level of `x`, a scalar."""
        return self._sigmas[self.step]

    @property
    def finished(self) -> bool:
        """Whether `x` is the clean latent."""
        return self.step == len(self._sigmas) - 1

    def advance(self, velocity: Tensor) -> None:
        """Take one step with the velocity (B, C, L) at `x`, on its device.

        Raises ToolError when a velocity is not finite: at once on a CPU, after the last step on a GPU, which would
        otherwise wait for the CPU at every step.
        """
        import torch

        self._finite.append(torch.isfinite(velocity).all())
        if velocity.device.type == "cpu" or self.step + 2 == len(self._sigmas):
            self._require_finite()
        after = self._sigmas[self.step + 1]
        self.x = (1.0 - after) * denoised(self.x, velocity, self.sigma) + after * next(self._noise)
        if self._kept is not None:
            self.x = torch.where(self._kept[1] > 0, self._kept[0], self.x)
        self.step += 1

    def _require_finite(self) -> None:
        import torch

        flags = torch.stack(self._finite).tolist()
        if not all(flags):
            step = flags.index(False)
            raise ToolError(
                f"the DiT gave values that are not finite at sigma {float(self._sigmas[step]):.4f} (step {step + 1})",
                "the engine or its ONNX is damaged or overflows: build it again, or try `precision=fp32`",
            )


def ping_pong(
    engine: VelocityEngine,
    noise: Iterator[Tensor],
    sigmas: Tensor,
    cond: Conditioning,
    on_step: Callable[[int, float], None] | None = None,
    start: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Latents (B, C, L) of rows that go step by step together; `on_step(i, sigma)` is called after each step.

    The other arguments are Trajectory's. Raises ToolError when a velocity is not finite.
    """
    path = Trajectory(noise, sigmas, start, kept)
    while not path.finished:
        step, sigma = path.step, path.sigma
        path.advance(engine.velocity(path.x, sigma.expand(path.x.shape[0]).contiguous(), cond))
        if on_step is not None:
            on_step(step, float(sigma))
    return path.x
