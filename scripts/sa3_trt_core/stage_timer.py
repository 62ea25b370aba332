"""Time and GPU memory of each stage of a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from sa3_trt_core import gpu


class Meter:
    """Measure each stage: seconds per row, and bytes of GPU memory in use after it."""

    def __init__(self, rows: int = 1) -> None:
        self._rows = rows
        self.timings: dict[str, float] = {}
        self.memory: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.add(name, (time.perf_counter() - started) / self._rows)

    def add(self, name: str, seconds: float, ended: bool = True) -> None:
        """Add `seconds` per row to a stage; once the stage has `ended`, also record the GPU memory in use."""
        self.timings[name] = self.timings.get(name, 0.0) + seconds
        used = gpu.memory_in_use() if ended else None
        if used is not None:
            self.memory[name] = max(used, self.memory.get(name, 0))
