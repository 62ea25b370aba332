"""Stages 2 and 3: rectified flow with captions, then consistency distillation to a few ping-pong steps."""

from __future__ import annotations

from typing import Any, cast

import torch

from sa3_demo.latents import LatentBatch, LatentSet
from sa3_demo.model import DemoModel
from sa3_demo.plan import TrainingPlan
from sa3_demo.trainer import Deadline, Keep, running_mean, seeded, train
from sa3_trt_core.sampling import schedule

GRID_STEPS = 8  # steps of the sampler
GRID_SHARE = 0.8  # share of distillation rows exactly at the sampler's noise levels
HUBER = 0.03


def warped(u: torch.Tensor) -> torch.Tensor:
    """Return the sampler's noise level at position u in 0..1, with ends 0 and 1 (schedule.py)."""
    sigma = torch.sigmoid(schedule.SLOPE * u + schedule.OFFSET)
    return torch.where(u >= 1.0, torch.ones_like(u), torch.where(u <= 0.0, torch.zeros_like(u), sigma))


def draw_sigmas(generator: torch.Generator, rows: int, device: torch.device) -> torch.Tensor:
    """Return training noise levels (rows,): the sampler's warp, 20 % exactly on its grid, 10 % uniform."""
    u = torch.rand(rows, generator=generator, device=device)
    selector = torch.rand(rows, generator=generator, device=device)
    grid = warped(torch.ceil(u * GRID_STEPS) / GRID_STEPS)
    return torch.where(selector < 0.2, grid, torch.where(selector < 0.3, u.clamp(1e-3, 1.0), torch.sigmoid(
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
    """Train a rectified flow: the velocity of x = (1 - sigma) x0 + sigma noise is noise - x0 (Liu et al. 2022).

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
    """Train by consistency distillation (Song et al. 2023): equal denoised latents at neighbouring noise levels.

    A guided midpoint step of the teacher goes from sigma to the next level. The running mean of the student predicts
    the denoised latent there, which is the student's target one level earlier. The text encoder is frozen.
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
        sigma, next_sigma = warped(u), warped((u - 1 / GRID_STEPS).clamp_min(0.0))
        level = sigma[:, None, None]
        noise = torch.randn(batch.latents.shape, generator=generator, device=device)
        x = (1 - level) * batch.latents + level * noise
        context, duration = model.context(batch.ids, batch.mask, batch.seconds)
        with torch.no_grad():
            target_latent = _target(teacher, follower, x, sigma, next_sigma, batch, plan.guidance)
        velocity = model.velocity(x, sigma, context, duration, batch.local)
        error = (x - level * velocity - target_latent).square().mean(dim=(1, 2))
        return {"total": ((error + HUBER**2).sqrt() - HUBER).mean(), "denoised": error.mean()}

    parameters = [p for p in model.parameters() if p.requires_grad]
    done, notes = train(
        "distillation", plan.distillation, parameters, loss_of, first, deadline,
        lambda step, so_far: keep(follower, step, so_far), lambda: target.update_parameters(model),
    )  # fmt: skip
    return done, notes, follower if done > first else model


def _target(
    teacher: DemoModel, student: DemoModel, x: torch.Tensor, sigma_now: torch.Tensor, next_sigma: torch.Tensor,
    batch: LatentBatch, guidance: float,
) -> torch.Tensor:  # fmt: skip
    """Return the denoised latent at the next level, reached by a midpoint step of the guided teacher."""
    context, duration = teacher.context(batch.ids, batch.mask, batch.seconds)

    def slope(point: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return teacher.guided(point, sigma, context, duration, batch.local, guidance)

    middle = (sigma_now + next_sigma) / 2
    midpoint = x + (middle - sigma_now)[:, None, None] * slope(x, sigma_now)
    x_next = x + (next_sigma - sigma_now)[:, None, None] * slope(midpoint, middle)
    context, duration = student.context(batch.ids, batch.mask, batch.seconds)
    velocity = student.velocity(x_next, next_sigma.clamp_min(1e-4), context, duration, batch.local)
    return x_next - next_sigma[:, None, None] * velocity


def compile_blocks(model: DemoModel, plan: TrainingPlan) -> None:
    """Compile each block with Inductor if the plan enables it; all blocks of a model share one graph."""
    if plan.compile:
        for block in (*model.dit.transformer_blocks, *model.text.encoder.layers):
            block.compile(dynamic=False)
