"""Noise on its way to a GPU: drawn on the CPU while the GPU works, uploaded from pinned memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_AHEAD = 16  # draws that `draw_ahead` keeps on the GPU: 4 MB each at the longest length


class UploadedNoise(Iterator["Tensor"]):
    """The endless tensors (B, C, V) of `sampler.row_noise` on a GPU, to the bit.

    The generators stay on the CPU: one seed is one sound on every machine. Nothing waits for the GPU: the sampler asks
    for the noise of a step when the velocity of that step is queued, so that it is drawn meanwhile. It is drawn into
    pinned memory and cut to `valid` frames on the GPU, because each copy on the CPU costs as much as the drawing. A
    thread would be slower: each new one starts a team of OpenMP threads of its own.
    """

    def __init__(self, seeds: Sequence[int], channels: int, frames: int, valid: int | None, device: str) -> None:
        import torch

        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._channels, self._frames, self._valid, self._device = channels, frames, valid, device
        self._ahead: deque[Tensor] = deque()

    def draw_ahead(self, draws: int) -> None:
        """Draw and upload the next `draws` tensors now, at most MAX_AHEAD, in one copy."""
        self._ahead.extend(self._drawn(min(draws, MAX_AHEAD - len(self._ahead))))

    @property
    def ahead(self) -> tuple[Tensor, ...]:
        """The tensors that are drawn and not used yet."""
        return tuple(self._ahead)

    def __next__(self) -> Tensor:
        """Return the next tensor."""
        return self._ahead.popleft() if self._ahead else self._drawn(1)[0]

    def _drawn(self, draws: int) -> list[Tensor]:
        import torch

        shape = (1, self._channels, self._frames)
        pinned = self._device == "cuda"
        drawn = torch.empty((max(draws, 0), len(self._generators), *shape[1:]), pin_memory=pinned)
        for draw in drawn:
            for row, generator in enumerate(self._generators):
                torch.randn(shape, generator=generator, out=draw[row : row + 1])
        return list(drawn.to(self._device, non_blocking=True)[..., : self._valid].contiguous())
