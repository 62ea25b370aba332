"""Intermediate results of a batch, and the cache of encoded texts and sounds that batches share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.audio.waveform import Waveform
from sa3_trt_core.request import Request
from sa3_trt_core.sampling.inputs import Features
from sa3_trt_core.stage_timer import Meter

if TYPE_CHECKING:
    from torch import Tensor

MAX_BLOCK_ROWS = 64  # max rows kept in memory between the stages with free_models
MAX_CACHED = 16  # entries of each kind in the EncodeCache of a ring


@dataclass
class Batch:
    """Intermediate results of one batch: rows of equal `batch_key`, text features, init latents and latents."""

    rows: Sequence[Request]
    meter: Meter
    features: Features = field(default_factory=dict)
    init_latents: Sequence[Tensor | None] = ()
    latents: Tensor | None = None


class EncodeCache:
    """Cache of text features and init latents by prompt and by (sound, start, frames), in insertion order."""

    def __init__(self) -> None:
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}
        self.sounds: dict[tuple[Path | Waveform, float, int], Tensor] = {}

    def evict(self, max_entries: int) -> None:
        """Remove the oldest entries beyond `max_entries` of each kind."""
        for words in list(self.texts)[:-max_entries]:
            del self.texts[words]
        for sound in list(self.sounds)[:-max_entries]:
            del self.sounds[sound]


def blocks(groups: list[list[int]], max_rows: int) -> Iterator[list[list[int]]]:
    """Yield consecutive batches in blocks of at most `max_rows` rows; a larger batch is a block of its own."""
    block: list[list[int]] = []
    for rows in groups:
        if block and sum(map(len, block)) + len(rows) > max_rows:
            yield block
            block = []
        block.append(rows)
    if block:
        yield block
