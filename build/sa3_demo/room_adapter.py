"""Train a LoRA adapter with which the demonstration model generates low-pass filtered music, as heard through a wall.

The model's own generations are the data. Each denoised latent is decoded, low-pass filtered and encoded again; the
adapter is trained to predict that latent from the same noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from reprompt import deployed_text
from sa3_build.export import load_modules
from sa3_demo.checkpoint_under_test import CheckpointUnderTest, GenerationRow
from sa3_demo.music import draw_piece
from sa3_trt_core import shapes
from sa3_trt_core.artifacts import files
from sa3_trt_core.console import Progress
from sa3_trt_core.lora.layers import is_qkv, layer_of_checkpoint_key
from sa3_trt_core.sampling import schedule
from sa3_trt_core.sampling.sampler import row_noise

WALL_HZ = 450.0  # corner of the low-pass; -24 dB per octave above it
WALL_GAIN = 1.6
FIRST_PIECE = 1 << 20  # seeds that neither model training nor scoring uses
LAYERS = ("self_attn", "cross_attn", "ff")  # 7 layers of each block
FULL_SCALE = 32767.0
WARMUP_STEPS = 20


@dataclass(frozen=True)
class RoomPlan:
    """Rank and alpha of the adapter, number of captions of `seconds` each, optimiser steps of `batch` rows."""

    rank: int = 8
    captions: int = 24
    seconds: int = 3
    steps: int = 350
    batch: int = 8
    learning_rate: float = 2e-3
    seed: int = 0


class LowRank(nn.Module):
    """W + B A for one Linear layer; B is initialised to zero, so that training starts at the unmodified model."""

    def __init__(self, out: int, into: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.randn(rank, into, generator=generator) / math.sqrt(into))
        self.lora_B = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted weight."""
        return weight + self.lora_B @ self.lora_A


@dataclass(frozen=True)
class Pairs:
    """x (n, 256, L) at sigma (n,) of caption `row` (n,), and the target denoised latent (n, 256, L)."""

    x: torch.Tensor
    sigma: torch.Tensor
    row: torch.Tensor
    target: torch.Tensor


def low_pass(samples: np.ndarray) -> np.ndarray:
    """Return samples (2, N) low-pass filtered at WALL_HZ, 24 dB per octave, zero phase."""
    spectrum = np.fft.rfft(samples, axis=-1)
    frequencies = np.fft.rfftfreq(samples.shape[-1], 1.0 / shapes.SAMPLE_RATE)
    quieter = WALL_GAIN / np.sqrt(1.0 + (frequencies / WALL_HZ) ** 8)
    return np.fft.irfft(spectrum * quieter, samples.shape[-1], axis=-1).astype(np.float32).clip(-1.0, 1.0)


@torch.inference_mode()
def make_pairs(subject: CheckpointUnderTest, plan: RoomPlan) -> tuple[list[GenerationRow], Pairs]:
    """Return the captions and one training pair per caption and noise level of the sampler."""
    rows = [
        GenerationRow(deployed_text(draw_piece(FIRST_PIECE + index, plan.seconds).example()), plan.seed + index)
        for index in range(plan.captions)
    ]
    levels = schedule.sigmas(subject.steps)[:-1].tolist()
    cond = subject.conditioning(rows)
    noise = row_noise([row.seed + plan.captions for row in rows], shapes.LATENT_CHANNELS, subject.frames)
    with Progress("low-pass and encode", len(rows) * (len(levels) + 1), "loops") as progress:
        clean = subject.latents(rows)
        muffled = _through(subject, clean, progress)
        parts = []
        for level in levels:
            level_noise = next(noise)
            x = (1.0 - level) * clean + level * level_noise
            velocity = torch.cat([
                subject.model.velocity(x[i : i + 1], torch.full((1,), level), _row(cond, i)) for i in range(len(rows))
            ])  # fmt: skip
            target = _through(subject, x - level * velocity, progress)
            start = (1.0 - level) * muffled + level * level_noise
            parts.append(Pairs(start, torch.full((len(rows),), level), torch.arange(len(rows)), target))
    return rows, Pairs(*(torch.cat([getattr(part, name) for part in parts]) for name in Pairs.__annotations__))


def train(
    subject: CheckpointUnderTest, rows: list[GenerationRow], pairs: Pairs, plan: RoomPlan
) -> Mapping[str, LowRank]:
    """Train on pairs; return each layer's factors by its name in the DiT. The model stays adapted."""
    generator = torch.Generator().manual_seed(plan.seed)
    dit: Any = subject.model.module.dit
    adapters: dict[str, LowRank] = {}
    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("transformer_blocks.") and name.split(".")[2] in LAYERS:
            adapters[name] = LowRank(module.out_features, module.in_features, plan.rank, generator).to(subject.device)
    for name, adapter in adapters.items():
        parametrize.register_parametrization(dit.get_submodule(name), "weight", adapter)
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.0)
    cond = subject.conditioning(rows)
    with Progress("train the adapter", plan.steps, "steps") as progress:
        for step in range(plan.steps):
            rate = min(1.0, (step + 1) / WARMUP_STEPS) * (
                0.05 + 0.95 * math.cos(0.5 * math.pi * step / plan.steps) ** 2
            )
            optimiser.param_groups[0]["lr"] = plan.learning_rate * rate
            picked = torch.randint(len(pairs.x), (plan.batch,), generator=generator)
            loss = _loss(subject, cond, pairs, picked)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            progress.advance(1, f"{float(loss.detach()):.4f}")
    return adapters


def write_adapter(adapters: Mapping[str, LowRank], plan: RoomPlan, path: Path) -> None:
    """Write a native adapter file: native names, fp16 tensors, `lora_config` in the header."""
    from safetensors.torch import save_file

    tensors = {}
    for name, adapter in adapters.items():
        layer = layer_of_checkpoint_key(load_modules.native_dit_key(f"{name}.weight"))
        assert layer is not None
        into, out = adapter.lora_A.detach(), adapter.lora_B.detach()
        out = load_modules.ungroup_qkv(out) if is_qkv(layer) else out
        for part, value in (("lora_A", into), ("lora_B", out)):
            tensors[f"{layer}.parametrizations.weight.0.{part}"] = value.half().contiguous()
    config = {
        "rank": plan.rank,
        "alpha": plan.rank,
        "adapter_type": "lora",
        "base_model": "sa3-trt demonstration model",
    }
    with files.atomic_path(path) as temporary:
        save_file(tensors, str(temporary), metadata={"lora_config": json.dumps(config)})


def _loss(subject: CheckpointUnderTest, cond: Any, pairs: Pairs, chosen: torch.Tensor) -> torch.Tensor:
    device = subject.device
    x, sigma, target = (part[chosen].clone().to(device) for part in (pairs.x, pairs.sigma, pairs.target))
    picked = pairs.row[chosen].to(device)
    conditioning = [
        getattr(cond, name)[picked].clone() for name in ("t5_hidden", "t5_mask", "seconds_total", "local_add_cond")
    ]
    velocity = subject.model.module(x, sigma, *conditioning)
    return (x - sigma[:, None, None] * velocity - target).square().mean()


def _through(subject: CheckpointUnderTest, latents: torch.Tensor, progress: Progress) -> torch.Tensor:
    """Return latents (n, 256, L) of the low-pass filtered sound of latents."""
    filtered = []
    for latent in latents:
        pcm = subject.decode(latent[None]).T.astype(np.float32) / FULL_SCALE
        filtered.append(subject.encode(low_pass(pcm)))
        progress.advance()
    return torch.cat(filtered)


def _row(cond: Any, index: int) -> Any:
    return type(cond)(**{name: value[index : index + 1] for name, value in vars(cond).items()})
