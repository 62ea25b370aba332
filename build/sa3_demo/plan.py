"""All constants of the demonstration model's training: model size, data, steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from sa3_demo.text_encoder import DemoSize

VOCABULARY = 352  # tokens, every printable ASCII character among them
CAPTION_TOKENS = 80  # the longest caption of music.py fits; longer texts are truncated in training only


@dataclass(frozen=True)
class StagePlan:
    """One training stage: optimiser steps, rows per step, and peak learning rate."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 300


@dataclass(frozen=True)
class TrainingPlan:
    """A training run: `loops` pieces of seeds 0..loops-1, and `crop_frames` latent frames per row of the autoencoder.

    All DiT rows have `latent_frames`, independent of their length, so that one shape is compiled; the rest is silence.
    """

    size: DemoSize
    loops: int
    crop_frames: int
    latent_frames: int
    autoencoder: StagePlan
    flow: StagePlan
    distillation: StagePlan
    seed: int = 0
    latent_noise: float = (
        0.2  # maximum, in standard deviations of the latents; makes the decoder robust to sampler errors
    )
    drop_condition: float = 0.1
    inpaint_share: float = 0.5
    guidance: float = 2.0  # of the teacher
    average: float = 0.9995  # decay of the running mean of weights
    compile: bool = False
    lengths: tuple[int, ...] = field(default=())  # seconds; () is music.LENGTHS


FULL = TrainingPlan(
    size=DemoSize(
        embed_dim=320, depth=3, num_heads=5, ff_mult=1.75, autoencoder_channels=32, autoencoder_depth=3,
        autoencoder_sinusoidal=2, text_layers=1, text_heads=2, text_hidden=96,
    ),
    loops=20_000,
    crop_frames=24,
    latent_frames=174,  # of a request for 10 s
    autoencoder=StagePlan(steps=9_000, batch=48, learning_rate=1.5e-3),
    flow=StagePlan(steps=9_500, batch=256, learning_rate=1.2e-3),
    distillation=StagePlan(steps=3_600, batch=128, learning_rate=3e-4),
    compile=True,
)  # fmt: skip


def shortened(plan: TrainingPlan, stage: str, steps: int, rows: int, loops: int) -> TrainingPlan:
    """Return a plan with a shorter `stage`, for machines without a GPU: steps, rows per step, first `loops` pieces.

    The learning rate scales with the root of the rows; the warm-up is a tenth of the steps. Compilation is off.
    """
    full: StagePlan = getattr(plan, stage)
    rate = full.learning_rate * math.sqrt(rows / full.batch)
    shorter = StagePlan(steps, rows, rate, warmup=max(1, min(full.warmup, steps // 10)))
    changed: dict[str, Any] = {stage: shorter}
    return replace(plan, loops=loops, compile=False, **changed)


TINY = TrainingPlan(
    size=DemoSize(
        embed_dim=128, depth=1, num_heads=2, ff_mult=2.0, autoencoder_channels=32, autoencoder_depth=1,
        autoencoder_sinusoidal=2, text_layers=1, text_heads=2, text_hidden=64,
    ),
    loops=4,
    crop_frames=4,
    latent_frames=44,
    autoencoder=StagePlan(steps=3, batch=2, learning_rate=1e-3, warmup=2),
    flow=StagePlan(steps=3, batch=2, learning_rate=1e-3, warmup=2),
    distillation=StagePlan(steps=2, batch=2, learning_rate=1e-4, warmup=2),
    lengths=(4,),
)  # fmt: skip
