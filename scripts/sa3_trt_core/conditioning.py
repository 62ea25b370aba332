"""Conditioning of a batch of rows: the DiT inputs other than x and t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the DiT is told besides x and t, all fp32.

    t5_hidden (B, 256, 768), t5_mask (B, 256) of 0/1, seconds_total (B,) in seconds, local_add_cond (B, 257, L): keep
    mask and masked latent, zeros for plain text to audio (zeros are fed, never left out: its embedding has biases).
    """

    t5_hidden: Tensor
    t5_mask: Tensor
    seconds_total: Tensor
    local_add_cond: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Self:
        """The rows of all parts as one batch; their latent frames are equally many."""
        import torch

        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))
