"""Training loops, rendered by worker processes into shared memory while training starts."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from sa3_demo.music import Piece, draw_piece
from sa3_demo.synth import render
from sa3_trt_core.shapes import SAMPLE_RATE

FULL_SCALE = 32767.0


def training_piece(seed: int, lengths: tuple[int, ...]) -> Piece:
    """Return the piece of a training seed; non-empty `lengths` override its length, in turn."""
    return draw_piece(seed, lengths[seed % len(lengths)] if lengths else None)


class LoopPool:
    """16-bit stereo loops of seeds 0..count-1 in shared memory; a context manager that stops its workers.

    Loop i is samples[offset[i] : offset[i] + size[i]], (N, 2). It is complete once `ready[i]` is set.
    """

    def __init__(self, count: int, lengths: tuple[int, ...] = (), workers: int | None = None) -> None:
        self.pieces = [training_piece(seed, lengths) for seed in range(count)]
        self.sizes = np.array([piece.seconds * SAMPLE_RATE for piece in self.pieces], dtype=np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        self._block = mmap.mmap(-1, int(self.offsets[-1]) * 4)
        self._flags = mmap.mmap(-1, count)
        self.samples: NDArray[np.int16] = np.frombuffer(self._block, dtype=np.int16).reshape(-1, 2)
        self.ready: NDArray[np.uint8] = np.frombuffer(self._flags, dtype=np.uint8)
        workers = workers or max(1, (os.cpu_count() or 2) - 2)
        context = multiprocessing.get_context("fork")  # workers inherit the shared memory
        self._workers = [
            context.Process(target=self._fill, args=(first, workers), daemon=True) for first in range(workers)
        ]

    def __enter__(self) -> LoopPool:
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()

    def wait(self, count: int) -> None:
        """Wait until loops 0..count-1 are rendered. Raises RuntimeError when a worker process has ended."""
        while not self.ready[:count].all():
            if any(worker.exitcode not in (None, 0) for worker in self._workers):
                raise RuntimeError("a rendering process ended unexpectedly")
            time.sleep(0.05)

    def loop(self, index: int) -> NDArray[np.int16]:
        """Return the samples (N, 2) of one loop."""
        return self.samples[self.offsets[index] : self.offsets[index + 1]]

    def on_device(self, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return loops 0..count-1 as one tensor (samples, 2) int16 on a device, and offsets (count + 1,) int64."""
        self.wait(count)
        samples = torch.from_numpy(self.samples[: self.offsets[count]])
        return samples.to(device), torch.from_numpy(self.offsets[: count + 1]).to(device)

    def _fill(self, first: int, step: int) -> None:
        for index in range(first, len(self.pieces), step):
            self.loop(index)[:] = np.round(render(self.pieces[index]).T * FULL_SCALE).astype(np.int16)
            self.ready[index] = 1
