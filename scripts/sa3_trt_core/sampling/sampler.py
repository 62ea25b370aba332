"""Ping-pong sampler: noise to latents with one velocity evaluation per step, on any engine."""

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
    """Return the denoised latent x - sigma v, for x and v (B, C, L)."""
    return x - sigma * v


def row_noise(seeds: Sequence[int], channels: int, frames: int, valid: int | None = None) -> Iterator[Tensor]:
    """Yield endless fp32 noise (B, C, V): each row from its own seeded CPU generator, drawn as randn(1, C, L).

    `valid` is V, the number of valid ones among the L `frames` (None: all). Noise of the padded frames is drawn too, so
    that the noise of the valid ones equals that of the model's own generation. The first draw is the initial noise,
    followed by one per step. A row's noise depends only on its seed, not on the batch or the GPU; for B = 1 it equals
    torch.manual_seed(seed) with torch.randn.
    """
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    while True:
        drawn = [torch.randn(1, channels, frames, generator=generator)[..., :valid] for generator in generators]
        yield torch.cat(drawn)


class Trajectory:
    """State of ping-pong sampling of B rows: `x` (B, C, L) at noise level `sigma`, advanced one step at a time.

    x starts as the first draw of noise; each step is d = x - s_i v, then x = (1 - s_{i+1}) d + s_{i+1} noise. Noise of
    the last step is drawn too, and multiplied by 0, as in the model's own sampler. `start` (B, C, L) is the init latent
    of audio to audio: x = (1 - s_0) start + s_0 noise. `kept` are latents (B, C, L) restored after every step where the
    mask (B, 1, L) is 1.
    Source: the model's own generation (build/FACTS.md, Generation).
    """

    def __init__(
        self, noise: Iterator[Tensor], sigmas: Tensor, start: Tensor | None = None,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self._noise, self._sigmas, self._kept = noise, sigmas, kept
        self._finite: list[Tensor] = []  # one flag per step, read later to avoid a synchronization
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
        """True after the last step: `x` is the denoised latent."""
        return self.step == len(self._sigmas) - 1

    def advance(self, velocity: Tensor) -> None:
        """Take one step with the velocity (B, C, L) at `x`, on its device.

        Raises ToolError for a non-finite velocity on a CPU. On a GPU the check would synchronize: see
        `require_finite`.
        """
        import torch

        self._finite.append(torch.isfinite(velocity).all())
        if velocity.device.type == "cpu":
            self.require_finite()
        _step([self], [velocity])

    def require_finite(self) -> None:
        """Raise ToolError if a velocity so far was not finite. Synchronizes with the GPU.

        Must be called before the latents are used.
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
        """Yield every tensor that later steps read, except their noise."""
        yield self.x
        yield from self._kept or ()

    def draw_ahead(self) -> None:
        """Draw and upload the noise of later steps now, if it is UploadedNoise; another thread may advance."""
        if isinstance(self._noise, UploadedNoise):
            self._noise.draw_ahead(len(self._sigmas))


def advance_together(paths: Sequence[Trajectory], velocities: Tensor) -> None:
    """Advance each path (1, C, L) with its row of `velocities` (R, C, L) on a GPU, without synchronization.

    One launch per operation instead of one per row: launches for eight rows would otherwise delay the next step.
    """
    import torch

    for path, finite in zip(paths, torch.isfinite(velocities).flatten(1).all(1), strict=True):
        path._finite.append(finite)
    _step(paths, velocities.split(1))


def _step(paths: Sequence[Trajectory], velocities: Sequence[Tensor]) -> None:
    """Advance each path, of any number of rows, to its next noise level: d = x - s v, then (1 - s') d + s' noise."""
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
    """Sample latents (B, C, L) of rows in lockstep; `on_step(i, sigma)` is called after each step.

    The other arguments are those of Trajectory. Raises ToolError for a non-finite velocity.
    """
    path = Trajectory(noise, sigmas, start, kept)
    while not path.finished:
        step, sigma = path.step, path.sigma
        path.advance(engine.velocity(path.x, sigma.expand(path.x.shape[0]).contiguous(), cond))
        if on_step is not None:
            on_step(step, float(sigma))
    path.require_finite()
    return path.x
