"""Draw noise on the CPU while the GPU works, and upload it from pinned memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_AHEAD = 16  # draws that `draw_ahead` keeps on the GPU: 4 MB each at the longest length


class UploadedNoise(Iterator["Tensor"]):
    """Iterator of the tensors (B, C, V) of `sampler.row_noise` on a GPU, bit for bit.

    CPU generators make a seed reproducible on every machine. The sampler requests noise after it has queued the step's
    velocity, so that drawing overlaps with the GPU. Noise is drawn into pinned memory and cut to `valid` frames on the
    GPU, because each copy on the CPU costs as much as the drawing. A new thread for each call would be slower: it
    starts its own team of OpenMP threads.
    """

    def __init__(self, seeds: Sequence[int], channels: int, frames: int, valid: int | None, device: str) -> None:
        import torch

        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._channels, self._frames, self._valid, self._device = channels, frames, valid, device
        self._ahead: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._draws = 0
        self._drawing = False  # one thread at a time: the generators' order is the order of the tensors
        self._changed = threading.Condition()

    def draw_ahead(self, draws: int) -> None:
        """Draw and upload until `draws` tensors have been drawn in all, keeping at most MAX_AHEAD.

        Another thread may take each as soon as it is drawn.
        """
        while self._begin(lambda: self._draws < draws and len(self._ahead) < MAX_AHEAD):
            with self._ending():
                self._ahead.append((self._drawn(), self._uploaded()))

    def __next__(self) -> Tensor:
        """Return the next tensor; the current stream waits for an upload queued on another stream."""
        with self._changed:
            self._changed.wait_for(lambda: self._ahead or not self._drawing)
            item = self._ahead.popleft() if self._ahead else None
            self._drawing |= item is None
        if item is None:
            with self._ending():
                return self._drawn()
        noise, uploaded = item
        if uploaded is not None:
            import torch

            stream = torch.cuda.current_stream()
            stream.wait_event(uploaded)
            noise.record_stream(stream)  # else the allocator could reuse its memory in the upload stream
        return noise

    def _begin(self, wanted: Callable[[], bool]) -> bool:
        """Wait for the drawing thread; then reserve the generators for the caller and return True if `wanted()`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._drawing)
            self._drawing = wanted()
            return self._drawing

    @contextmanager
    def _ending(self) -> Iterator[None]:
        """Context manager of a draw; afterwards release the generators and notify waiting threads."""
        try:
            yield
        finally:
            with self._changed:
                self._draws += 1
                self._drawing = False
                self._changed.notify_all()

    def _uploaded(self) -> torch.cuda.Event | None:
        """Record an event after the uploads queued so far; None on a CPU."""
        import torch

        return torch.cuda.current_stream().record_event() if self._device == "cuda" else None

    def _drawn(self) -> Tensor:
        import torch

        shape = (1, self._channels, self._frames)
        drawn = torch.empty((len(self._generators), *shape[1:]), pin_memory=self._device == "cuda")
        for row, generator in enumerate(self._generators):
            torch.randn(shape, generator=generator, out=drawn[row : row + 1])
        return drawn.to(self._device, non_blocking=True)[..., : self._valid].contiguous()
