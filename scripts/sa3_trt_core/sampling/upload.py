"""Noise on its way to a GPU: drawn on the CPU while the GPU works, uploaded from pinned memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def uploaded_noise(
    seeds: Sequence[int], channels: int, frames: int, valid: int | None, device: str
) -> Iterator[Tensor]:
    """Yield the tensors of `sampler.row_noise` on `device`, to the bit.

    The generators stay on the CPU: one seed is one sound on every machine. Nothing waits for the GPU: the sampler asks
    for the noise of a step when the velocity of that step is queued, so that it is drawn meanwhile. It is drawn into
    pinned memory and cut to `valid` frames on the GPU, because each copy on the CPU costs as much as the drawing. A
    thread would be slower: each new one starts a team of OpenMP threads of its own.
    """
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    while True:
        drawn = torch.empty((len(seeds), channels, frames), pin_memory=device == "cuda")
        for row, generator in enumerate(generators):
            torch.randn((1, channels, frames), generator=generator, out=drawn[row : row + 1])
        yield drawn.to(device, non_blocking=True)[..., :valid].contiguous()
