"""Many generations at different steps in one forward: a ring whose places are refilled as they fall free."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sa3_trt_core.conditioning import Conditioning
from sa3_trt_core.sampling.sampler import Trajectory

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.engines.base import VelocityEngine
    from sa3_trt_core.sampling.guidance import Guidance
    from sa3_trt_core.stage_timer import Meter


@dataclass(frozen=True)
class RingRow:
    """One generation in the ring: where it stands, what the DiT is told of it (one row), and what it is led by."""

    path: Trajectory
    cond: Conditioning
    guidance: Guidance | None
    meter: Meter


def ring(
    engine: VelocityEngine,
    rows: Iterator[tuple[int, RingRow]],
    depth: int,
    on_step: Callable[[float], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(key, latents (1, 256, L)) of each row as it is finished; at most `depth` rows are under way at a time.

    All rows have equally many latent frames. Each has its own noise, schedule, conditioning and guidance, so that it
    takes the path that it would take alone. One row joins before each forward: rows then stand at different steps and
    finish one after the other, which leaves the decoder one at a time. A row is drawn from `rows` when its place is
    free. `on_step(sigma)` is called for every row after every forward. Raises ToolError when a velocity is not finite.
    """
    import torch

    places: list[tuple[int, RingRow]] = []
    while True:
        if len(places) < depth and (joining := next(rows, None)) is not None:
            places.append(joining)
        if not places:
            return
        started = time.perf_counter()
        with torch.inference_mode():
            _advance(engine, [row for _, row in places], on_step)
        share = (time.perf_counter() - started) / len(places)
        for _, row in places:
            row.meter.add("sample", share)
        finished = [(key, row.path.x) for key, row in places if row.path.finished]
        places = [place for place in places if not place[1].path.finished]
        yield from finished


def _advance(engine: VelocityEngine, rows: list[RingRow], on_step: Callable[[float], None] | None) -> None:
    """One step of every row, by one forward: the text rows first, then the null rows of those that are guided."""
    import torch

    guided = [(place, row.guidance) for place, row in enumerate(rows) if row.guidance is not None]
    order = [*range(len(rows)), *(place for place, _ in guided)]
    sigmas = [row.path.sigma for row in rows]
    found = engine.velocity(
        torch.cat([rows[place].path.x for place in order]),
        torch.stack([sigmas[place] for place in order]),
        Conditioning.joined([*(row.cond for row in rows), *(guidance.null for _, guidance in guided)]),
    )
    velocities = list(found.split(1))
    for number, (place, guidance) in enumerate(guided):
        null = velocities[len(rows) + number]
        velocities[place] = guidance.velocity(rows[place].path.x, sigmas[place][None], velocities[place], null)
    for row, velocity, sigma in zip(rows, velocities, sigmas, strict=False):
        row.path.advance(velocity)
        if on_step is not None:
            on_step(float(sigma))
