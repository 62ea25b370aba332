"""Classifier-free guidance: conditional and unconditional rows in one forward of 2B rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.engines.base import Closeable
from sa3_trt_core.sampling.sampler import denoised

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import VelocityEngine


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance settings: `null`, the unconditional or negative inputs; scale `cfg`; APG strength `apg`.

    `apg` in 0..1 is the share of the guidance parallel to the denoised latent that is removed.
    """

    null: Conditioning
    cfg: float
    apg: float

    def velocity(self, x: Tensor, t: Tensor, with_text: Tensor, without: Tensor) -> Tensor:
        """Return the guided velocity (B, C, L) at x (B, C, L) and t (B,) from conditional and unconditional ones."""
        if self.apg:
            # D_text - D_null = -sigma (v_text - v_null): both have the same parallel component.
            clean = denoised(x, with_text, t[:, None, None].to(x.device))
            without = without + self.apg * parallel_part(with_text - without, clean)
        return guided(with_text, without, self.cfg)


class GuidedVelocity(Closeable):
    """VelocityEngine that applies guidance to another: B rows from one forward of 2B, conditional rows first.

    Does not close the other engine.
    """

    def __init__(self, engine: VelocityEngine, guidance: Guidance) -> None:
        self._engine, self._guidance = engine, guidance
        self._both: tuple[Conditioning, Conditioning] | None = None  # last call: conditional rows, and all rows

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Return the guided velocity (B, 256, L) for x (B, 256, L) and t (B,)."""
        import torch

        if self._both is None or self._both[0] is not cond:
            self._both = cond, Conditioning.joined([cond, self._guidance.null])
        velocities = self._engine.velocity(torch.cat([x, x]), torch.cat([t, t]), self._both[1])
        return self._guidance.velocity(x, t, *velocities.chunk(2))


def guided(with_text: Tensor, without: Tensor, cfg: float) -> Tensor:
    """Return the guided velocity (B, C, L): without + cfg (with_text - without); cfg 1 returns with_text bit for bit.

    Source: classifier-free guidance (Ho, Salimans 2022).
    """
    return with_text + (cfg - 1.0) * (with_text - without)


def parallel_part(difference: Tensor, direction: Tensor) -> Tensor:
    """Return the projection of `difference` (B, C, L) on `direction`, over channels and time of each row.

    In fp64, as the model's own: it sums a million products. Source: build/FACTS.md, Generation.
    """
    import torch

    wide = direction.double()
    unit = wide / torch.linalg.vector_norm(wide, dim=(-1, -2), keepdim=True).clamp(min=1e-12)
    along = (difference.double() * unit).sum(dim=(-1, -2), keepdim=True)
    return (along * unit).to(difference.dtype)


def negative_conditioning(cond: Conditioning, hidden: Tensor, mask: Tensor) -> Conditioning:
    """Return the conditioning of negative-prompt rows: the text's features (B, 256, 768), zero where its mask is zero.

    The mask (B, 256) becomes all ones, so that the model inserts no padding embedding; the duration is unchanged. The
    same holds for an empty negative prompt. Source: the model's own generation.
    """
    import torch

    return replace(cond, t5_hidden=hidden * mask.unsqueeze(-1), t5_mask=torch.ones_like(mask))


def null_conditioning(cond: Conditioning) -> Conditioning:
    """Return the conditioning of unconditional rows (B): zero text and mask; duration and local_add_cond unchanged.

    Zero text with a zero mask marks an unconditional row: our graphs then zero all cross tokens, including the
    duration's, as the model's own null branch does. No text produces this pair (`positive_conditioning`).
    """
    import torch

    return replace(cond, t5_hidden=torch.zeros_like(cond.t5_hidden), t5_mask=torch.zeros_like(cond.t5_mask))


def positive_conditioning(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (B, 256, 768) and mask (B, 256) of texts, none of which marks an unconditional row.

    Without BOS an empty text has a zero mask. All its features are then padding, which the padding embedding replaces,
    so ones can be used instead of zeros.
    """
    import torch

    marked = (hidden.abs().amax(dim=(1, 2)) == 0) & (mask.amax(dim=1) <= 0)
    return torch.where(marked[:, None, None], torch.ones_like(hidden), hidden), mask
