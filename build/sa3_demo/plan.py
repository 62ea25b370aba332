"""Every number of the demonstration model's training in one place: its size, its data, its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from sa3_demo.text_encoder import DemoSize

VOCABULARY = 352  # tokens, every printable ASCII character among them
CAPTION_TOKENS = 80  # the longest caption of music.py fits; longer texts are cut in training only


@dataclass(frozen=True)
class StagePlan:
    """One stage of training: optimiser steps, rows a step, and the learning rate at its peak."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int = 300


@dataclass(frozen=True)
class TrainingPlan:
    """A whole training run: `loops` pieces of seeds 0..loops-1, and `crop_frames` latent frames an autoencoder's row.

    All DiT rows have `latent_frames`, whatever their length: one shape is one compilation, and what follows the music
    is silence.
    """

    size: DemoSize
    loops: int
    crop_frames: int
    latent_frames: int
    autoencoder: StagePlan
    flow: StagePlan
    distillation: StagePlan
    seed: int = 0
    latent_noise: float = 0.2  # most, in units of the latents' deviation: the decoder must survive a sampler's errors
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
    """Return a plan whose `stage` has so many steps of so many rows from the first `loops` pieces, for machines without
    a GPU.

    The learning rate falls with the root of the rows; the warm-up is a tenth of the steps. Nothing is compiled.
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
