"""Stage 1: train the SAME autoencoder, from rendered loops to latents of unit scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sa3_demo.losses import reconstruction_loss
from sa3_demo.plan import TrainingPlan
from sa3_demo.pool import FULL_SCALE, LoopPool
from sa3_demo.trainer import Deadline, Keep, seeded, train
from sa3_trt_core.shapes import SAMPLES_PER_FRAME

STD_DECAY = 0.99  # of the running standard deviation of the latents
TRAINING_LOOPS = 4000  # maximum; the others are for the DiT only
START_SCALE = 0.3  # of the last matrix of each branch, which diffusers initialises to zero and which then learns slowly


def train_autoencoder(
    autoencoder: Any,
    plan: TrainingPlan,
    pool: LoopPool,
    first: int,
    deadline: Deadline,
    device: torch.device,
    keep: Keep,
) -> tuple[int, list[dict[str, Any]]]:
    """Train encoder and decoder in place on random crops; return the steps done and the loss notes.

    Noise of up to `latent_noise` standard deviations is added to the latents before the decoder. It makes the decoder
    robust to a sampler's errors, and the encoder use its range for audible content.
    """
    samples, offsets = pool.on_device(min(TRAINING_LOOPS, len(pool.pieces)), device)
    autoencoder.train().requires_grad_(True)
    if plan.compile:
        for side in (autoencoder.encoder, autoencoder.decoder):
            for layer in side.blocks[0].transformers:
                layer.compile(dynamic=False)
    running_std = autoencoder.bottleneck.running_std

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        generator = seeded(device, plan.seed, "autoencoder", step)
        audio = draw_crops(samples, offsets, plan.autoencoder.batch, plan.crop_frames, generator)
        raw = autoencoder.encoder(autoencoder.patch_embed.encode(audio))
        raw = (raw * autoencoder.bottleneck.scale + autoencoder.bottleneck.bias).float()
        deviation = raw.detach().std()
        running_std.copy_(deviation.view(1) if step == 0 else torch.lerp(deviation.view(1), running_std, STD_DECAY))
        noise_level = plan.latent_noise * torch.rand(len(audio), 1, 1, device=device, generator=generator)
        noise = torch.randn(raw.shape, device=device, generator=generator)
        noisy = raw / running_std + noise_level * noise
        decoded = autoencoder.patch_embed.decode(autoencoder.decoder(autoencoder.bottleneck.decode(noisy)))
        with torch.autocast(device.type, enabled=False):
            return reconstruction_loss(decoded.float(), audio)

    done = train(
        "autoencoder", plan.autoencoder, autoencoder.parameters(), loss_of, first, deadline,
        lambda step, notes: keep(autoencoder, step, notes),
    )  # fmt: skip
    autoencoder.eval().requires_grad_(False)
    return done


@torch.no_grad()
def wake(autoencoder: Any) -> None:
    """Initialise branches and tokens of a new autoencoder to nonzero values, from torch's generator."""
    for key, parameter in autoencoder.named_parameters():
        if key.endswith(("to_out.weight", "ff.proj_out.weight")):
            parameter.normal_(0.0, START_SCALE * parameter.shape[1] ** -0.5)
        elif key.endswith("new_tokens"):
            parameter.normal_(0.0, START_SCALE)


def draw_crops(
    samples: torch.Tensor, offsets: torch.Tensor, rows: int, frames: int, generator: torch.Generator
) -> torch.Tensor:
    """Return random crops of random loops, float32 (rows, 2, frames * 4096) within +-1, on the samples' device.

    A tenth may start in the silence before or end in the silence after the loop, as real requests do.
    """
    device, samples_per_crop = samples.device, frames * SAMPLES_PER_FRAME
    index = torch.randint(len(offsets) - 1, (rows,), generator=generator, device=device)
    begin, end = offsets[index], offsets[index + 1]
    overhang = (torch.rand(rows, generator=generator, device=device) < 0.1) * (samples_per_crop // 2)
    positions = (end - begin - samples_per_crop + 2 * overhang).clamp_min(1)
    first = begin - overhang + (torch.rand(rows, generator=generator, device=device) * positions).long()
    position = first[:, None] + torch.arange(samples_per_crop, device=device)
    inside = (position >= begin[:, None]) & (position < end[:, None])
    crops = samples[position.clamp(0, len(samples) - 1)] * inside.unsqueeze(-1)
    return crops.permute(0, 2, 1).float() / FULL_SCALE


@torch.no_grad()
def centre_latents(autoencoder: Any, pool: LoopPool, device: torch.device, loops: int = 256) -> None:
    """Normalise the latents to mean 0 per channel and standard deviation 1 overall, without changing decoded audio.

    The bottleneck absorbs shift and scale; the decoder's first projection reverts them.
    """
    sample = torch.cat(
        [encode_loop(autoencoder, pool, i, device)[0] for i in range(min(loops, len(pool.pieces)))], dim=1
    )
    mean = sample.mean(dim=1)
    bottleneck, projection = autoencoder.bottleneck, autoencoder.decoder.proj
    shift = mean * bottleneck.running_std
    bottleneck.bias -= shift[None, :, None]
    projection.bias += projection.weight @ shift
    deviation = (sample - mean[:, None]).std()
    # decode multiplies by running_std, encode divides by it: the two cancel.
    bottleneck.running_std.mul_(deviation)


@torch.no_grad()
def encode_loop(autoencoder: Any, pool: LoopPool, index: int, device: torch.device, pad: int = 0) -> torch.Tensor:
    """Return latents (1, 256, L) of one loop followed by `pad` samples of silence, fp32."""
    pool.wait(index + 1)
    audio = torch.from_numpy(pool.loop(index).astype(np.float32) / FULL_SCALE).T[None].to(device)
    latents: torch.Tensor = autoencoder.encode(torch.nn.functional.pad(audio, (0, pad))).latents
    return latents
