"""Many generations at different steps in one forward: a ring whose places are refilled as they fall free."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from sa3_trt_core.engines.base import rows_velocity
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampling.sampler import Trajectory, advance_together

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.conditioning import Conditioning
    from sa3_trt_core.engines.base import VelocityEngine
    from sa3_trt_core.sampling.guidance import Guidance
    from sa3_trt_core.stage_timer import Meter


@dataclass(frozen=True)
class RingRow:
    """State of one in-flight generation: trajectory, conditioning (one row) and optional guidance."""

    path: Trajectory
    cond: Conditioning
    guidance: Guidance | None
    meter: Meter

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Yield every tensor of the row that lies on the sampler's device."""
        yield from self.path.tensors
        yield from self.cond.tensors
        if self.guidance is not None:
            yield from self.guidance.null.tensors

    @property
    def forward_rows(self) -> int:
        """Rows of the DiT's batch that it takes: itself, and its null row if it is guided."""
        return 1 if self.guidance is None else 2


class Ring:
    """Rows at different steps of their own schedules: admitted, advanced and removed between forwards.

    Each row has its own noise, schedule, conditioning and guidance, so that it takes the path that it would take alone.
    Rows of equally many latent frames share a forward, of at most `max_batch` rows (None: any number); a guided row
    counts as two. With `alone` every row and its null row have a forward of their own: a backend whose products round
    differently in a larger batch then gives the sound of `generate` to the bit. `on_step(sigma)` is called for every
    row after every forward. A row keeps its place in the order of the batch, so that an engine need not take in the
    conditioning of the others again when one leaves. Not for use from several threads at once.
    """

    def __init__(
        self, engine: VelocityEngine, depth: int, on_step: Callable[[float], None] | None = None,
        max_batch: int | None = None, alone: bool = False,
    ) -> None:  # fmt: skip
        self._engine, self._on_step, self._max_batch, self._alone = engine, on_step, max_batch, alone
        self._places: dict[Hashable, RingRow] = {}
        self._order: list[Hashable | None] = []  # of the rows in a batch; None until somebody takes the place
        self.depth = depth

    def __len__(self) -> int:
        return len(self._places)

    def admit(self, key: Hashable, row: RingRow) -> None:
        """Let a row take part from the next step on. Raises ValueError when no place is free."""
        if len(self._places) >= self.depth:
            raise ValueError(f"all {self.depth} places of the ring are taken")
        self._places[key] = row
        if None not in self._order:
            self._order.append(None)
        self._order[self._order.index(None)] = key

    def remove(self, key: Hashable) -> bool:
        """Free the place of a row before it is finished; return False when it has none."""
        if self._places.pop(key, None) is None:
            return False
        self._order[self._order.index(key)] = None
        return True

    def step(self) -> list[tuple[Hashable, Tensor | Exception]]:
        """Advance every row once and return those that leave: (key, latents (1, 256, L)), or (key, what failed).

        A velocity that is not finite fails its own row, an engine that fails all rows of that forward. On a GPU nothing
        is waited for: the latents are those of work that is queued on the current stream, and `require_finite` of the
        row's path is to be called before they are used.
        """
        import torch

        failed: dict[Hashable, Exception] = {}
        with torch.inference_mode():
            for keys in self._forwards():
                failed |= self._forward(keys)
        finished = {key: row.path.x for key, row in self._places.items() if key not in failed and row.path.finished}
        left: dict[Hashable, Tensor | Exception] = {**failed, **finished}
        for key in left:
            self.remove(key)
        return list(left.items())

    def _forwards(self) -> list[list[Hashable]]:
        """Return the rows of each forward of a step."""
        self._order = [key for key in self._order if key is not None]
        if self._alone:
            return [[key] for key in self._order]
        lengths: dict[int, list[list[Hashable]]] = {}
        for key in self._order:
            row = self._places[key]
            groups = lengths.setdefault(row.path.x.shape[-1], [[]])
            taken = sum(self._places[other].forward_rows for other in groups[-1])
            if groups[-1] and self._max_batch is not None and taken + row.forward_rows > self._max_batch:
                groups.append([])
            groups[-1].append(key)
        return [group for groups in lengths.values() for group in groups]

    def _forward(self, keys: list[Hashable]) -> dict[Hashable, Exception]:
        rows = [self._places[key] for key in keys]
        started = time.perf_counter()
        try:
            errors = _advance(self._engine, rows, self._on_step)
        except Exception as error:  # of the engine: these rows have no velocity, the others of the ring go on
            return dict.fromkeys(keys, error)
        share = (time.perf_counter() - started) / len(rows)
        for row in rows:
            row.meter.add("sample", share, ended=row.path.finished)
        return {key: error for key, error in zip(keys, errors, strict=True) if error is not None}


def ring(
    engine: VelocityEngine,
    rows: Iterator[tuple[int, RingRow]],
    depth: int,
    on_step: Callable[[float], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """(key, latents (1, 256, L)) of each row as it is finished; at most `depth` rows are under way at a time.

    One row joins before each forward: rows then stand at different steps and finish one after the other, which leaves
    the decoder one at a time. A row is drawn from `rows` when its place is free. `on_step(sigma)` is called for every
    row after every forward. Raises what a forward raises, and ToolError when a velocity is not finite.
    """
    places, under_way = Ring(engine, depth, on_step), dict[int, RingRow]()
    while True:
        if len(places) < depth and (joining := next(rows, None)) is not None:
            places.admit(*joining)
            under_way.update([joining])
        if not places:
            return
        for key, latents in places.step():
            if isinstance(latents, Exception):
                raise latents
            under_way.pop(cast(int, key)).path.require_finite()
            yield cast(int, key), latents


def _advance(
    engine: VelocityEngine, rows: list[RingRow], on_step: Callable[[float], None] | None
) -> list[ToolError | None]:
    """Advance every row by one forward, the text rows first, then the null rows of those that are guided.

    Returns what is wrong with the velocity of each row, None for most.
    """
    import torch

    guided = [(place, row.guidance) for place, row in enumerate(rows) if row.guidance is not None]
    order = [*range(len(rows)), *(place for place, _ in guided)]
    sigmas = [row.path.sigma for row in rows]
    velocity = rows_velocity(
        engine,
        torch.cat([rows[place].path.x for place in order]),
        torch.stack([sigmas[place] for place in order]),
        [*(row.cond for row in rows), *(guidance.null for _, guidance in guided)],
    )
    if guided:
        parts = list(velocity.split(1))
        for number, (place, guidance) in enumerate(guided):
            null = parts[len(rows) + number]
            parts[place] = guidance.velocity(rows[place].path.x, sigmas[place][None], parts[place], null)
        velocity = torch.cat(parts[: len(rows)])
    errors: list[ToolError | None] = [None] * len(rows)
    if velocity.is_cuda:
        advance_together([row.path for row in rows], velocity)
    else:
        for place, row in enumerate(rows):
            try:
                row.path.advance(velocity[place : place + 1])
            except ToolError as error:
                errors[place] = error
    if on_step is not None:
        for sigma in sigmas:
            on_step(float(sigma))
    return errors
