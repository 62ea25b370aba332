"""One batch on its way to sound, and what batches share."""

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

TOGETHER = 64  # max rows kept in memory between the stages with free_models
REMEMBERED = 16  # texts and encoded sounds that rows of a ring may share


@dataclass
class Batch:
    """One batch on its way to sound: rows of equal batch_key, and their results so far."""

    rows: Sequence[Request]
    meter: Meter
    features: Features = field(default_factory=dict)
    init_latents: Sequence[Tensor | None] = ()
    latents: Tensor | None = None


class EncodeCache:
    """Texts and sounds that are encoded already, so that each is encoded once; the oldest go first."""

    def __init__(self) -> None:
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}
        self.sounds: dict[tuple[Path | Waveform, float, int], Tensor] = {}

    def evict(self, max_entries: int) -> None:
        """Keep the latest `max_entries` of each."""
        for words in list(self.texts)[:-max_entries]:
            del self.texts[words]
        for sound in list(self.sounds)[:-max_entries]:
            del self.sounds[sound]


def blocks(groups: list[list[int]], max_rows: int) -> Iterator[list[list[int]]]:
    """Batches in blocks of at most `max_rows` rows, or of one batch."""
    block: list[list[int]] = []
    for rows in groups:
        if block and sum(map(len, block)) + len(rows) > max_rows:
            yield block
            block = []
        block.append(rows)
    if block:
        yield block
