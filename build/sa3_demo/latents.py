"""Encoded training loops with their captions, from which the DiT's training stages draw batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reprompt import deployed_text
from sa3_demo.model import token_batch
from sa3_demo.plan import CAPTION_TOKENS, TrainingPlan
from sa3_demo.pool import FULL_SCALE, LoopPool, training_piece
from sa3_trt_core.artifacts import files
from sa3_trt_core.shapes import SAMPLE_RATE, SAMPLES_PER_FRAME

DEPLOYED_SHARE = 0.65  # share of rows with the deployed caption; the others have the short request
ENCODE_BATCH = 32


@dataclass(frozen=True)
class LatentBatch:
    """Latents (B, 256, L) fp32, ids and mask (B, T), seconds (B,), local_add_cond (B, 257, L), dropped (B,) bool."""

    latents: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    seconds: torch.Tensor
    local: torch.Tensor
    dropped: torch.Tensor


class LatentSet:
    """All training loops of a plan, encoded (n, 256, L) in the order of their seeds, on one device."""

    def __init__(self, plan: TrainingPlan, latents: torch.Tensor, tokenizer: Any, device: torch.device) -> None:
        pieces = [training_piece(seed, plan.lengths) for seed in range(plan.loops)]
        texts = [deployed_text(piece.example()) for piece in pieces], [piece.request() for piece in pieces]
        ids, mask = zip(*(token_batch(tokenizer, part, CAPTION_TOKENS) for part in texts), strict=True)
        self._plan = plan
        self._latents = latents.to(device)
        self._ids, self._mask = torch.stack(ids).to(device), torch.stack(mask).to(device)
        self._seconds = torch.tensor([float(piece.seconds) for piece in pieces], device=device)

    def batch(self, generator: torch.Generator, rows: int) -> LatentBatch:
        """Return random rows, each with its caption or its request."""
        device = self._latents.device
        picked = torch.randint(len(self._latents), (rows,), generator=generator, device=device)
        form = (torch.rand(rows, generator=generator, device=device) > DEPLOYED_SHARE).long()
        x0, seconds = self._latents[picked].float(), self._seconds[picked]
        frames = torch.ceil(seconds * (SAMPLE_RATE / SAMPLES_PER_FRAME))
        keep = keep_masks(generator, frames, x0.shape[-1], self._plan.inpaint_share)
        dropped = torch.rand(rows, generator=generator, device=device) < self._plan.drop_condition
        return LatentBatch(
            x0, self._ids[form, picked], self._mask[form, picked], seconds, torch.cat([keep, keep * x0], dim=1), dropped
        )


def keep_masks(generator: torch.Generator, frames: torch.Tensor, length: int, share: float) -> torch.Tensor:
    """Return keep masks (rows, 1, length) of 0/1: a `share` of the rows keeps all but one span, the others nothing.

    The span is 10 to 100 % of the `frames` (rows,) with sound. Frames after those are not kept, as in deployment
    (sampling/inpainting.py): the DiT is never run with a mask that keeps its padding.
    """
    rows, device = len(frames), frames.device
    width = (0.1 + 0.9 * torch.rand(rows, generator=generator, device=device)) * frames
    start = torch.rand(rows, generator=generator, device=device) * (frames - width)
    position = torch.arange(length, device=device)
    inside = (position >= start.floor()[:, None]) & (position < (start + width).ceil()[:, None])
    chosen = torch.rand(rows, 1, generator=generator, device=device) < share
    sounds = position < frames[:, None]
    return (~inside & chosen & sounds).float().unsqueeze(1)


@torch.no_grad()
def encode_pool(autoencoder: Any, plan: TrainingPlan, pool: LoopPool, device: torch.device) -> torch.Tensor:
    """Return latents (n, 256, L) fp16 of every loop, padded with silence to the plan's length."""
    pool.wait(len(pool.pieces))
    samples = plan.latent_frames * SAMPLES_PER_FRAME
    parts = []
    for first in range(0, len(pool.pieces), ENCODE_BATCH):
        members = range(first, min(first + ENCODE_BATCH, len(pool.pieces)))
        audio = torch.zeros(len(members), samples, 2, dtype=torch.int16)
        for row, index in enumerate(members):
            loop = torch.from_numpy(pool.loop(index))[:samples]
            audio[row, : len(loop)] = loop
        waves = audio.to(device).permute(0, 2, 1).float() / FULL_SCALE
        parts.append(autoencoder.encode(waves).latents.half().cpu())
    return torch.cat(parts)


def cached_latents(path: Path) -> torch.Tensor | None:
    """Return the latents that `store_latents` wrote, or None."""
    from safetensors.torch import load_file

    return load_file(str(path))["latents"] if path.is_file() else None


def store_latents(path: Path, latents: torch.Tensor) -> None:
    """Write encoded loops for a later run on the same machine."""
    from safetensors.torch import save_file

    with files.atomic_path(path) as temporary:
        save_file({"latents": latents}, str(temporary))
