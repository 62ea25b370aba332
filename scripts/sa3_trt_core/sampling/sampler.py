"""Ping-pong sampling: from noise to latents with one velocity a step, through any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampling.upload import UploadedNoise

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import VelocityEngine


def denoised(x: Tensor, v: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the clean latent that a velocity points at: x - sigma v, for x and v (B, C, L)."""
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
        """True if `x` is the clean latent."""
        return self.step == len(self._sigmas) - 1

    def advance(self, velocity: Tensor) -> None:
        """Take one step with the velocity (B, C, L) at `x`, on its device.

        On a CPU raises ToolError when a velocity is not finite. On a GPU that would wait for the step: see
        `require_finite`.
        """
        import torch

        self._finite.append(torch.isfinite(velocity).all())
        if velocity.device.type == "cpu":
            self.require_finite()
        _step([self], [velocity])

    def require_finite(self) -> None:
        """Raise ToolError when a velocity of the steps so far was not finite. Waits for the GPU where `x` lies on one.

        To be called before the latents are used.
        """
        import torch

        flags = torch.stack(self._finite).tolist() if self._finite else []
        if not all(flags):
            step = flags.index(False)
            raise ToolError(
                f"the DiT gave values that are not finite at sigma {float(self._sigmas[step]):.4f} (step {step + 1})",
                "the engine or its ONNX is damaged or overflows: build it again, or try `precision=fp32`",
            )

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor that the coming steps read, but for their noise."""
        yield self.x
        yield from self._kept or ()

    def draw_ahead(self) -> None:
        """Draw and upload the noise of the coming steps now, where it goes to a GPU; another thread may advance."""
        if isinstance(self._noise, UploadedNoise):
            self._noise.draw_ahead(len(self._sigmas))


def advance_together(paths: Sequence[Trajectory], velocities: Tensor) -> None:
    """Take one step of each path (1, C, L) with its row of `velocities` (R, C, L) on a GPU. Waits for nothing.

    In a launch an operation instead of one a row: with eight rows the launches would otherwise take longer than the gap
    between two steps may.
    """
    import torch

    for path, finite in zip(paths, torch.isfinite(velocities).flatten(1).all(1), strict=True):
        path._finite.append(finite)
    _step(paths, velocities.split(1))


def _step(paths: Sequence[Trajectory], velocities: Sequence[Tensor]) -> None:
    """Move each path, of any number of rows, to its next noise level: d = x - s v, then (1 - s') d + s' noise."""
    import torch

    after = [path._sigmas[path.step + 1] for path in paths]
    levels = [float(path.sigma) for path in paths]
    x = torch._foreach_sub([path.x for path in paths], torch._foreach_mul(list(velocities), levels))
    torch._foreach_mul_(x, [float(1.0 - level) for level in after])  # 1 - s' rounded to fp32
    noise = torch._foreach_mul([next(path._noise) for path in paths], [float(level) for level in after])
    torch._foreach_add_(x, noise)
    for path, arrived in zip(paths, x, strict=True):
        kept = path._kept
        path.x = arrived if kept is None else torch.where(kept[1] > 0, kept[0], arrived)
        path.step += 1


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
    path.require_finite()
    return path.x
