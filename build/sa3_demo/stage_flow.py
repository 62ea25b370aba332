"""Stages 2 and 3: rectified flow with captions, then consistency distillation to a few ping-pong steps at cfg 1."""

from __future__ import annotations

from typing import Any, cast

import torch

from sa3_demo.latents import Batch, LatentSet
from sa3_demo.model import DemoModel
from sa3_demo.plan import TrainingPlan
from sa3_demo.trainer import Deadline, Keep, running_mean, seeded, train
from sa3_trt_core.sampling import schedule

GRID_STEPS = 8  # the sampler's own
GRID_SHARE = 0.8  # of the distilled rows stand exactly on the sampler's noise levels
HUBER = 0.03


def warped(u: torch.Tensor) -> torch.Tensor:
    """Return the sampler's noise level at position u of 0..1, its ends set to 0 and 1 (schedule.py)."""
    sigma = torch.sigmoid(schedule.SLOPE * u + schedule.OFFSET)
    return torch.where(u >= 1.0, torch.ones_like(u), torch.where(u <= 0.0, torch.zeros_like(u), sigma))


def draw_sigmas(generator: torch.Generator, rows: int, device: torch.device) -> torch.Tensor:
    """Training noise levels (rows,): the sampler's warp, a fifth exactly on its grid, a tenth spread evenly."""
    u = torch.rand(rows, generator=generator, device=device)
    which = torch.rand(rows, generator=generator, device=device)
    grid = warped(torch.ceil(u * GRID_STEPS) / GRID_STEPS)
    return torch.where(which < 0.2, grid, torch.where(which < 0.3, u.clamp(1e-3, 1.0), torch.sigmoid(
        schedule.SLOPE * u + schedule.OFFSET)))  # fmt: skip


def train_flow(
    model: DemoModel,
    plan: TrainingPlan,
    data: LatentSet,
    first: int,
    deadline: Deadline,
    device: torch.device,
    keep: Keep,
) -> tuple[int, list[dict[str, Any]], DemoModel]:
    """Rectified flow: the velocity of x = (1 - sigma) x0 + sigma noise is noise - x0 (Liu et al. 2022).

    Returns the steps done, the loss notes and the running mean of the weights, which is the result.
    """
    average = running_mean(model, plan.average)
    model.train()
    compile_blocks(model, plan)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        generator = seeded(device, plan.seed, "flow", step)
        batch = data.batch(generator, plan.flow.batch)
        noise = torch.randn(batch.latents.shape, generator=generator, device=device)
        sigma = draw_sigmas(generator, plan.flow.batch, device)
        level = sigma[:, None, None]
        context, duration = model.context(batch.ids, batch.mask, batch.seconds)
        context = context * (~batch.dropped)[:, None, None]
        velocity = model.velocity((1 - level) * batch.latents + level * noise, sigma, context, duration, batch.local)
        return {"total": (velocity - (noise - batch.latents)).square().mean()}

    parameters = [p for p in model.parameters() if p.requires_grad]
    done, notes = train(
        "flow", plan.flow, parameters, loss_of, first, deadline,
        lambda step, so_far: keep(average.module, step, so_far), lambda: average.update_parameters(model),
    )  # fmt: skip
    return done, notes, cast(DemoModel, average.module) if done > first else model


def train_distillation(
    model: DemoModel, teacher: DemoModel, plan: TrainingPlan, data: LatentSet, first: int, deadline: Deadline,
    device: torch.device, keep: Keep,
) -> tuple[int, list[dict[str, Any]], DemoModel]:  # fmt: skip
    """Consistency distillation (Song et al. 2023): from one noise level to the next, the denoised latent is the same.

    A guided midpoint step of the teacher goes from sigma to the next level; the running mean of the student says what
    the denoised latent is there; the student learns to say it one level earlier. The text encoder stays as it is.
    """
    model.text.requires_grad_(False)
    target = running_mean(model, 0.995).requires_grad_(False)
    follower = cast(DemoModel, target.module)
    teacher.eval().requires_grad_(False)
    for module in (model, teacher, follower):
        compile_blocks(module, plan)

    def loss_of(step: int) -> dict[str, torch.Tensor]:
        generator = seeded(device, plan.seed, "distillation", step)
        rows = plan.distillation.batch
        batch = data.batch(generator, rows)
        u = torch.rand(rows, generator=generator, device=device)
        on_grid = torch.rand(rows, generator=generator, device=device) < GRID_SHARE
        u = torch.where(on_grid, torch.ceil(u * GRID_STEPS) / GRID_STEPS, u)
        now, after = warped(u), warped((u - 1 / GRID_STEPS).clamp_min(0.0))
        level = now[:, None, None]
        noise = torch.randn(batch.latents.shape, generator=generator, device=device)
        x = (1 - level) * batch.latents + level * noise
        context, duration = model.context(batch.ids, batch.mask, batch.seconds)
        with torch.no_grad():
            wanted = _target(teacher, follower, x, now, after, batch, plan.guidance)
        velocity = model.velocity(x, now, context, duration, batch.local)
        error = (x - level * velocity - wanted).square().mean(dim=(1, 2))
        return {"total": ((error + HUBER**2).sqrt() - HUBER).mean(), "denoised": error.mean()}

    parameters = [p for p in model.parameters() if p.requires_grad]
    done, notes = train(
        "distillation", plan.distillation, parameters, loss_of, first, deadline,
        lambda step, so_far: keep(follower, step, so_far), lambda: target.update_parameters(model),
    )  # fmt: skip
    return done, notes, follower if done > first else model


def _target(
    teacher: DemoModel, student: DemoModel, x: torch.Tensor, now: torch.Tensor, after: torch.Tensor, batch: Batch,
    guidance: float,
) -> torch.Tensor:  # fmt: skip
    """Return the denoised latent at the next level, reached by a midpoint step of the guided teacher."""
    context, duration = teacher.context(batch.ids, batch.mask, batch.seconds)

    def slope(at: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return teacher.guided(at, sigma, context, duration, batch.local, guidance)

    middle = (now + after) / 2
    half = x + (middle - now)[:, None, None] * slope(x, now)
    there = x + (after - now)[:, None, None] * slope(half, middle)
    context, duration = student.context(batch.ids, batch.mask, batch.seconds)
    velocity = student.velocity(there, after.clamp_min(1e-4), context, duration, batch.local)
    return there - after[:, None, None] * velocity


def compile_blocks(model: DemoModel, plan: TrainingPlan) -> None:
    """Let Inductor fuse each block, if the plan says so: one graph for all of a model's blocks."""
    if plan.compile:
        for block in (*model.dit.transformer_blocks, *model.text.encoder.layers):
            block.compile(dynamic=False)
