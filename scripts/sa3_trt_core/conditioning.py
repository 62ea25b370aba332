"""Conditioning of a batch of rows: the DiT inputs other than x and t."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the DiT other than x and t, all fp32.

    t5_hidden (B, 256, 768), t5_mask (B, 256) of 0/1, seconds_total (B,) in seconds, local_add_cond (B, 257, L): keep
    mask and masked latent, zeros for text to audio (the input is required: its embedding has biases).
    """

    t5_hidden: Tensor
    t5_mask: Tensor
    seconds_total: Tensor
    local_add_cond: Tensor

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Yield the four tensors."""
        return (getattr(self, field.name) for field in fields(self))

    @cached_property
    def durations(self) -> list[float]:
        """Seconds of each row. Synchronizes with the GPU on first use if the tensors are there."""
        return [float(value) for value in self.seconds_total.tolist()]

    @cached_property
    def keeps(self) -> bool:
        """True if local_add_cond is not all zero (in-painting). Synchronizes with the GPU on first use."""
        return bool(self.local_add_cond.any())

    def on(self, device: str) -> Self:
        """Return a copy on a device, with `durations` and `keeps` precomputed so that later uses do not synchronize."""
        known = self.durations, self.keeps
        moved = type(self)(*(value.to(device) for value in self.tensors))
        moved.__dict__["durations"], moved.__dict__["keeps"] = known
        return moved

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Self:
        """Concatenate parts of equal latent length into one batch."""
        import torch

        return cls(*(torch.cat(values) for values in zip(*(part.tensors for part in parts), strict=True)))
