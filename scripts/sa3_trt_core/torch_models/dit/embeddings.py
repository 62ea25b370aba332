"""Compute the inputs of the DiT's blocks: modulation from a noise level (fp32), cross tokens from a text (fp16)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.torch_models.dit.weights import Packed
from sa3_trt_core.torch_models.kernels.linear import linear


class Front:
    """Layers of a packed DiT that do not depend on x; each runs once per noise level or once per generation."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._depth = packed.sizes.depth
        self._tables = torch.stack([packed.tensor(f"blocks.{i}.modulation") for i in range(self._depth)])
        self.products = {name: packed.product(name) for name in ("context_in", "context_out")}

    def duration(self, seconds: Tensor) -> Tensor:
        """Return the duration token (B, 768) for seconds (B,)."""
        share = seconds.float().clamp(0.0, self._packed.sizes.seconds_range) / self._packed.sizes.seconds_range
        return self._linear("seconds", self._waves(share, "seconds.frequencies", self._packed.sizes.angular))

    def modulation(self, t: Tensor, seconds: Tensor) -> Tensor:
        """Return scales, shifts and gates of every block: (6, depth, B, width) fp32 for t (B,) and seconds (B,).

        First axis: scale, shift and gate of the self-attention, then of the feed-forward; gates are sigmoid(1 - g).
        """
        condition = functional.silu(functional.linear(self.duration(seconds), self._packed.tensor("global.0.weight")))
        condition = functional.linear(condition, self._packed.tensor("global.2.weight"))
        level = self._linear("time.0", self._waves(t.float(), "time.frequencies"))
        condition = condition + self._linear("time.2", functional.silu(level))
        shared = self._linear("modulation.2", functional.silu(self._linear("modulation.0", condition)))
        parts = (self._tables[:, None, :] + shared).unflatten(-1, (6, -1)).permute(2, 0, 1, 3).contiguous()
        for gate in (2, 5):
            parts[gate] = torch.sigmoid(1.0 - parts[gate])
        return parts

    def context(self, t5_hidden: Tensor, t5_mask: Tensor, seconds: Tensor) -> Tensor:
        """Return the cross tokens (B, 257, width) fp16: padding replaced, duration token last, null rows zero."""
        token = self.duration(seconds).unsqueeze(1)
        text = torch.where(t5_mask.unsqueeze(-1) > 0.5, t5_hidden.float(), self._packed.tensor("padding"))
        tokens = torch.cat([text, token], dim=1)
        if self._packed.sizes.null_rows:
            marks = t5_hidden.abs().amax(dim=(1, 2), keepdim=True) + t5_mask.abs().amax(dim=1)[:, None, None]
            tokens = tokens * (marks > 0)
        hidden = functional.silu(linear(tokens.to(torch.float16), self.products["context_in"]).float())
        return linear(hidden.to(torch.float16), self.products["context_out"])

    def _linear(self, name: str, value: Tensor) -> Tensor:
        return functional.linear(value, self._packed.tensor(f"{name}.weight"), self._packed.tensor(f"{name}.bias"))

    def _waves(self, value: Tensor, frequencies: str, angular: bool = False) -> Tensor:
        # Multiply in the graph's order: angles reach 62,832 rad, where one more rounding is an error of 4e-3 rad.
        angles = value[:, None] * self._packed.tensor(frequencies)
        angles = angles if angular else angles * 2.0 * math.pi
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
