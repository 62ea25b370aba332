"""Continuous batching: generations at different steps share a forward, and free slots are refilled between steps."""

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
        """Yield every tensor of the row on the sampler's device."""
        yield from self.path.tensors
        yield from self.cond.tensors
        if self.guidance is not None:
            yield from self.guidance.null.tensors

    @property
    def forward_rows(self) -> int:
        """Number of rows in the DiT's batch: 2 with guidance (conditional and unconditional), else 1."""
        return 1 if self.guidance is None else 2


class Ring:
    """Scheduler of in-flight rows: admits, advances and removes them between forwards.

    Each row has its own noise, schedule, conditioning and guidance; its result does not depend on the other rows. Rows
    of equal latent length share a forward of at most `max_batch` rows (None: unlimited); a guided row counts as two.
    With `alone` every row, with its unconditional row, has its own forward: a backend whose GEMMs round differently in
    a larger batch then reproduces `generate` bit for bit. `on_step(sigma)` is called for every row after every forward.
    A row keeps its index in the batch, so that an engine does not reload the conditioning of the other rows when one
    leaves. Not thread-safe.
    """

    def __init__(
        self, engine: VelocityEngine, depth: int, on_step: Callable[[float], None] | None = None,
        max_batch: int | None = None, alone: bool = False,
    ) -> None:  # fmt: skip
        self._engine, self._on_step, self._max_batch, self._alone = engine, on_step, max_batch, alone
        self._places: dict[Hashable, RingRow] = {}
        self._order: list[Hashable | None] = []  # batch order; None marks a free index
        self.depth = depth

    def __len__(self) -> int:
        return len(self._places)

    def admit(self, key: Hashable, row: RingRow) -> None:
        """Add a row from the next step on. Raises ValueError without a free slot."""
        if len(self._places) >= self.depth:
            raise ValueError(f"all {self.depth} slots of the ring are in use")
        self._places[key] = row
        if None not in self._order:
            self._order.append(None)
        self._order[self._order.index(None)] = key

    def remove(self, key: Hashable) -> bool:
        """Remove an unfinished row; return False if it is not in the ring."""
        if self._places.pop(key, None) is None:
            return False
        self._order[self._order.index(key)] = None
        return True

    def step(self) -> list[tuple[Hashable, Tensor | Exception]]:
        """Advance every row once; return finished and failed rows as (key, latents (1, 256, L)) or (key, exception).

        A non-finite velocity fails its own row; an exception of the engine fails all rows of that forward. On a GPU
        nothing is synchronized: the latents are results of work queued on the current stream, and the caller must call
        `require_finite` of the row's path before it uses them.
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
        """Return the keys of each forward of a step."""
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
        except Exception as error:  # engine error: fails these rows, the other forwards continue
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
    """Yield (key, latents (1, 256, L)) of each row as it finishes; at most `depth` rows are in flight.

    One row joins before each forward, so that rows are at different steps and finish one by one, as the decoder takes
    them. `rows` is advanced only when a slot is free. `on_step(sigma)` is called for every row after every forward.
    Raises the exception of a forward, and ToolError for a non-finite velocity.
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
    """Advance every row by one forward of the conditional rows, followed by the unconditional rows of guided ones.

    Returns the error of each row, None for a finite velocity (always None on a GPU, where it is not checked here).
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
