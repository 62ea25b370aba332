"""Classifier-free guidance: the null row beside the text row."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.sampler import Conditioning


def null_conditioning(cond: Conditioning) -> Conditioning:
    """Conditioning of the null rows (B): text told of, and all of it zero; duration and local_add_cond as they are.

    Our own exported graphs take zero text for the null row and zero the duration's cross token as well, which is the
    model's own null branch (facts.md, section 2). The mask is one: a masked position would be the padding embedding.
    """
    import torch

    return replace(cond, t5_hidden=torch.zeros_like(cond.t5_hidden), t5_mask=torch.ones_like(cond.t5_mask))


def guided(with_text: Tensor, without: Tensor, cfg: float) -> Tensor:
    """The velocity that guidance steps with: without + cfg * (with_text - without), all (B, C, L).

    cfg 1 is the text's own velocity, more than 1 goes beyond it. Source: classifier-free guidance (Ho, Salimans 2022).
    """
    return without + cfg * (with_text - without)
