"""Build sampler inputs from requests: sigmas, conditioning, initial latents and guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.request import FULL_APG, Request
from sa3_trt_core.sampling import guidance, schedule
from sa3_trt_core.sampling.inpainting import keep_mask, local_conditioning
from sa3_trt_core.shapes import LATENT_CHANNELS

if TYPE_CHECKING:
    from torch import Tensor

Features = Mapping[str, tuple["Tensor", "Tensor"]]  # text -> t5_hidden (1, 256, 768), t5_mask (1, 256)


def sigmas_of(request: Request) -> Tensor:
    """Return the noise levels (steps + 1,) of a request."""
    if request.legacy_schedule:
        return schedule.legacy_sigmas(request.steps, request.frames, request.sigma_max)
    return schedule.sigmas(request.steps, request.sigma_max, request.schedule_order)


def conditioning(
    rows: Sequence[Request], features: Features, init_latents: Sequence[Tensor | None]
) -> tuple[Conditioning, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Return the DiT's conditioning, the initial latents of audio to audio, and (latents, mask) of the kept frames.

    `init_latents` are latents (1, 256, L) of the rows' init audio. All results are cut to the V valid frames, which
    must be equal for all rows. local_add_cond (B, 257, V) is zero in rows without kept frames.
    """
    import torch

    frames = rows[0].valid_frames
    silent = torch.zeros(1, LATENT_CHANNELS, frames)
    latents = torch.cat([silent if init is None else init[..., :frames] for init in init_latents])
    keeps = [keep_mask(row.seconds, frames, row.inpaint) if row.inpaint else silent[:, :1] for row in rows]
    keep = torch.cat(keeps)
    texts = [features[row.prompt] for row in rows]
    hidden, mask = guidance.positive_conditioning(*(torch.cat(part) for part in zip(*texts, strict=True)))
    cond = Conditioning(
        t5_hidden=hidden,
        t5_mask=mask,
        seconds_total=torch.tensor([row.seconds for row in rows], dtype=torch.float32),
        local_add_cond=local_conditioning(latents, keep),
    )
    varied = rows[0].init_noise_level is not None
    return cond, latents if varied else None, (latents, keep) if rows[0].paste_kept else None


def guidance_of(rows: Sequence[Request], cond: Conditioning, features: Features) -> guidance.Guidance | None:
    """Return guidance of rows of equal batch key: unconditional (or negative) rows and scale; None without guidance."""
    import torch

    first = rows[0]
    if first.cfg == 1.0:
        return None
    null = guidance.null_conditioning(cond)
    hidden, mask = list(null.t5_hidden.split(1)), list(null.t5_mask.split(1))
    for index, row in enumerate(rows):
        if row.negative_prompt is not None:
            away = guidance.negative_conditioning(cond, *features[row.negative_prompt])
            hidden[index], mask[index] = away.t5_hidden, away.t5_mask
    null = replace(null, t5_hidden=torch.cat(hidden), t5_mask=torch.cat(mask))
    return guidance.Guidance(null, first.cfg, FULL_APG if first.apg is None else first.apg)
