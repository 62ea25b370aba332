"""The operations of a DiT block in plain PyTorch: the reference for the kernels, and the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.torch_models.dit.weights import HEAD_CHANNELS
from sa3_trt_core.torch_models.kernels.linear import quantize_activation


class PlainOps:
    """Residual, norm, attention and gate with the kernels' precision: fp32 inside, fp16 or E4M3 outputs."""

    def __init__(self, cosine: Tensor, sine: Tensor) -> None:
        """Set the rotary table: `cosine`, `sine` (positions, 32)."""
        self._cosine, self._sine = cosine, sine

    def add_normed(
        self, hidden: Tensor, stored: Tensor, multiplier: Tensor | None, addend: Tensor | None, local: Tensor | None,
        memory: int, gain: Tensor | None, shift: Tensor | None, epsilon: float, activation_scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        branch = stored.float()
        if multiplier is not None:
            branch = branch * multiplier.unsqueeze(1)
        if addend is not None:
            branch = branch + addend.unsqueeze(1)
        total = hidden.float() + branch
        if local is not None:
            total[:, memory:] += local.float()
        total = total.to(torch.float16)
        return total, total if gain is None else self.normed(total, gain, shift, epsilon, activation_scale)

    def normed(
        self, hidden: Tensor, gain: Tensor, shift: Tensor | None, epsilon: float, activation_scale: float | None
    ) -> Tensor:
        value = _rms(hidden.float(), epsilon) * gain.unsqueeze(1)
        return quantize_activation(value if shift is None else value + shift.unsqueeze(1), activation_scale)

    def self_attention(
        self, stored: Tensor, ratio: Tensor | None, q_gamma: Tensor, k_gamma: Tensor, epsilon: float, bound: float,
        activation_scale: float | None,
    ) -> Tensor:  # fmt: skip
        parts = _whole(stored, ratio).unflatten(-1, (5, -1, HEAD_CHANNELS))
        q, k, v = parts[:, :, 0:2], parts[:, :, 2:4], parts[:, :, 4].to(torch.float16)
        return _attend(
            self._turned(_rms(q, epsilon) * q_gamma), self._turned(_rms(k, epsilon) * k_gamma), v, activation_scale
        )

    def cross_attention(
        self, stored: Tensor, ratio: Tensor | None, keys: Tensor, q_gamma: Tensor, epsilon: float, bound: float,
        activation_scale: float | None,
    ) -> Tensor:  # fmt: skip
        q = _whole(stored, ratio).unflatten(-1, (2, -1, HEAD_CHANNELS))
        heads = keys.unflatten(-1, (3, -1, HEAD_CHANNELS))
        return _attend(
            (_rms(q, epsilon) * q_gamma).to(torch.float16), heads[:, :, 0:2], heads[:, :, 2], activation_scale
        )

    def gated(self, stored: Tensor, ratio: Tensor | None, bias: Tensor, activation_scale: float | None) -> Tensor:
        value, gate = (_whole(stored, ratio) + bias).chunk(2, dim=-1)
        return quantize_activation(value * functional.silu(gate), activation_scale)

    def _turned(self, heads: Tensor) -> Tensor:
        """Apply the rotary embedding to (B, T, 2, H, 64), in fp16; channel i is paired with channel i + 16."""
        tokens, quarter = heads.shape[1], HEAD_CHANNELS // 4
        first, second, rest = heads.split((quarter, quarter, 2 * quarter), dim=-1)
        cos, sin = (table[:tokens, :quarter].view(1, tokens, 1, 1, -1) for table in (self._cosine, self._sine))
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
        return turned.to(torch.float16)


def head_norm(heads: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    """Return the RMS norm over the last axis, in fp16."""
    return (_rms(heads.float(), epsilon) * gamma).to(torch.float16)


def _whole(stored: Tensor, ratio: Tensor | None) -> Tensor:
    return stored.float() if ratio is None else stored.float() * ratio


def _rms(value: Tensor, epsilon: float) -> Tensor:
    return value * torch.rsqrt(value.square().mean(dim=-1, keepdim=True) + epsilon)


def _attend(q: Tensor, k: Tensor, v: Tensor, activation_scale: float | None) -> Tensor:
    """Return the quantised attention (B, T, H * 64) for q (B, T, 2, H, 64), k (B, S, 2, H, 64), v (B, S, H, 64)."""
    value = v.float().transpose(1, 2)
    halves = [
        functional.scaled_dot_product_attention(
            q[:, :, half].float().transpose(1, 2), k[:, :, half].float().transpose(1, 2), value
        )
        for half in range(2)
    ]
    return quantize_activation((halves[0] - halves[1]).transpose(1, 2).flatten(2), activation_scale)
