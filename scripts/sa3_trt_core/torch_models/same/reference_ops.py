"""The operations of a SAME layer in plain PyTorch: the reference for the kernels, and the CPU implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.shapes import FULL_SCALE
from sa3_trt_core.torch_models.kernels.linear import Product, quantize_activation, quantize_rows
from sa3_trt_core.torch_models.same.weights import HEAD_CHANNELS, ROTATED_PAIRS, DynamicTanh

QUERIES_AT_ONCE = 1024


class ReferenceOps:
    """Residual, norm, windowed attention, gate and PCM at the kernels' precision: fp32 inside, fp16 or E4M3 outputs."""

    def __init__(self, rates: Tensor) -> None:
        """Set `rates` (16,) fp32: radians per token of the rotary pairs."""
        self._rates = rates

    def norm(self, hidden: Tensor, norm: DynamicTanh, scale: float | None, out: Tensor | None = None) -> Tensor:
        """Return the dynamic tanh norm of the residual (M, C) fp16, in fp16 or quantised by `scale`."""
        value = quantize_activation(norm.gamma * torch.tanh(norm.alpha * hidden.float()) + norm.beta, scale)
        return value if out is None else out.copy_(value)

    def add_norm(
        self, hidden: Tensor, stored: Tensor, product: Product, row_scale: Tensor | None, norm: DynamicTanh | None,
        scale: float | None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Add a layer's result to the residual (M, C) fp16 in place; return `norm` of the sum (the sum if None).

        `stored` (M, C) are the layer's sums, `row_scale` (M,) the scales of its input rows.
        """
        branch = stored.float()
        if row_scale is not None:
            branch = branch * row_scale[:, None]
        if product.ratio is not None:
            branch = branch * product.ratio
        if product.bias is not None:
            branch = branch + product.bias
        hidden.copy_((hidden.float() + branch).to(torch.float16))
        return hidden if norm is None else self.norm(hidden, norm, scale, out)

    def attention(
        self, qkv: Tensor, first: int, begin: int, end: int, tokens: int, reach: int, q_norm: DynamicTanh,
        k_norm: DynamicTanh,
    ) -> Tensor:  # fmt: skip
        """Return differential attention (end - begin, C) fp16: tokens begin..end over keys |i - j| <= reach of a row.

        `qkv` (count, 5 C) fp16 are the sums of tokens first..first + count. Tokens are numbered through all rows; each
        row has `tokens`.
        """
        parts = qkv.float().unflatten(-1, (5, -1, HEAD_CHANNELS))
        place = first + torch.arange(qkv.shape[0], device=qkv.device)
        turned = [_normed(parts[:, 0:2], q_norm), _normed(parts[:, 2:4], k_norm)]
        q, k = (self._rotated(value, place % tokens).half().float() for value in turned)
        v = parts[:, 4]
        shift = torch.arange(-reach, reach + 1, device=qkv.device)
        outputs = []
        for start in range(begin, end, QUERIES_AT_ONCE):
            query = torch.arange(start, min(start + QUERIES_AT_ONCE, end), device=qkv.device)
            key = query[:, None] + shift
            inside = (key >= 0) & (key // tokens == query[:, None] // tokens)
            at = (key - first).clamp(0, qkv.shape[0] - 1)
            scores = torch.einsum("qshd,qkshd->qshk", q[query - first], k[at]) * HEAD_CHANNELS**-0.5
            weights = scores.masked_fill(~inside[:, None, None, :], float("-inf")).softmax(-1).half().float()
            halves = torch.einsum("qshk,qkhd->qshd", weights, v[at])
            outputs.append((halves[:, 0] - halves[:, 1]).flatten(1).to(torch.float16))
        return torch.cat(outputs)

    def gate(self, stored: Tensor, product: Product, sinusoidal: bool, fp8: bool) -> tuple[Tensor, Tensor | None]:
        """Return a * silu(g) or a * sin(pi g), (M, F), for sums (M, 2 F) of a and g; if `fp8`, codes and row scales."""
        whole = stored.float() if product.ratio is None else stored.float() * product.ratio
        value, gate = (whole if product.bias is None else whole + product.bias).chunk(2, dim=-1)
        result = value * (
            torch.sin(math.pi * (gate - 2 * torch.round(gate / 2))) if sinusoidal else functional.silu(gate)
        )
        return quantize_rows(result) if fp8 else (result.to(torch.float16), None)

    def pcm(self, patches: Tensor, bias: Tensor, stride: int, channels: int) -> Tensor:
        """Return samples (T, channels) int16, rounded to even, for `patches` (M, channels * patch) fp32 of all tokens.

        The first of every stride + 1 tokens is the latent token, which has no samples.
        """
        return torch.round(self.samples(patches, bias, stride, channels).clamp(-1.0, 1.0) * FULL_SCALE).to(torch.int16)

    def samples(self, patches: Tensor, bias: Tensor, stride: int, channels: int) -> Tensor:
        """Return samples (T, channels) fp32, unclipped."""
        kept = (patches + bias).unflatten(0, (-1, stride + 1))[:, 1:].flatten(0, 1)
        return kept.unflatten(1, (channels, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def _rotated(self, heads: Tensor, position: Tensor) -> Tensor:
        """Apply the rotary embedding to (M, 2, H, 64); channel i < 16 is paired with channel i + 32."""
        angle = position.float()[:, None] * self._rates
        cos, sin = (value[:, None, None, :] for value in (angle.cos(), angle.sin()))
        first, kept, second, rest = heads.split((ROTATED_PAIRS,) * 4, dim=-1)
        return torch.cat([first * cos - second * sin, kept, second * cos + first * sin, rest], dim=-1)


def _normed(heads: Tensor, norm: DynamicTanh) -> Tensor:
    return norm.gamma * torch.tanh(norm.alpha * heads) + norm.beta
