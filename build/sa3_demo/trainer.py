"""Shared parts of the training stages: steps with a deadline, learning rate, running means, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sa3_demo.plan import StagePlan
from sa3_trt_core.console import Progress

LAST_SHARE = 0.03  # of the peak learning rate, at the last step
NOTE_EVERY = 250  # steps
KEEP_SECONDS = 60.0
MAX_GRADIENT_NORM = 1.0  # norm
Keep = Callable[[nn.Module, int, list[dict[str, Any]]], None]  # module, steps done, losses recorded
STAGE_NUMBERS = {"autoencoder": 1, "flow": 2, "distillation": 3}


@dataclass
class Deadline:
    """Time at which this run must stop and save; never if `minutes` is None."""

    minutes: float | None
    _started: float = field(default_factory=time.monotonic)

    def passed(self) -> bool:
        """Return True once the deadline has passed."""
        return self.minutes is not None and time.monotonic() - self._started > 60.0 * self.minutes


def learning_rate(plan: StagePlan, step: int, first: int) -> float:
    """Return the learning rate: linear warm-up from the run's first step, then a cosine over the whole stage."""
    warm = min(1.0, (step - first + 1) / plan.warmup)
    share = LAST_SHARE + (1.0 - LAST_SHARE) * 0.5 * (1.0 + math.cos(math.pi * step / plan.steps))
    return plan.learning_rate * warm * share


def running_mean(module: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential running mean of a module's weights, to be updated after every step."""
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))


def seeded(device: torch.device, seed: int, stage: str, step: int) -> torch.Generator:
    """Return the random generator of one step; a resumed run draws the same numbers."""
    return torch.Generator(device).manual_seed(((seed * 7 + STAGE_NUMBERS[stage]) << 32) + step)


def train(
    stage: str,
    plan: StagePlan,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[int], dict[str, torch.Tensor]],
    first: int,
    deadline: Deadline,
    keep: Callable[[int, list[dict[str, Any]]], None],
    after_step: Callable[[], None] | None = None,
) -> tuple[int, list[dict[str, Any]]]:
    """Run the optimiser from step `first` to the stage's end or the deadline; return the steps done and loss notes.

    `loss_of(step)` returns named losses with a "total"; `keep(steps, notes)` is called every `KEEP_SECONDS`, so that an
    interruption loses little. AdamW, gradients clipped to norm 1. Raises FloatingPointError when a recorded loss is not
    finite.
    """
    weights = list(parameters)
    device = weights[0].device
    optimiser = torch.optim.AdamW(weights, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    notes: list[dict[str, Any]] = []
    step, text, last_save = first, "", time.monotonic()
    with Progress(f"train {stage}", plan.steps, "steps") as progress:
        progress.count = first
        while step < plan.steps and not deadline.passed():
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(plan, step, first)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                losses = loss_of(step)
            losses["total"].backward()
            nn.utils.clip_grad_norm_(weights, MAX_GRADIENT_NORM)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if after_step is not None:
                after_step()
            step += 1
            if step % NOTE_EVERY == 0 or step == plan.steps:
                values = {name: round(value.item(), 5) for name, value in losses.items()}
                if not math.isfinite(values["total"]):
                    raise FloatingPointError(f"{stage}: the loss is {values['total']} at step {step}")
                notes.append({"stage": stage, "step": step, **values})
                text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            progress.advance(1, text)
            if time.monotonic() - last_save > KEEP_SECONDS:
                keep(step, notes)
                last_save = time.monotonic()
    return step, notes
