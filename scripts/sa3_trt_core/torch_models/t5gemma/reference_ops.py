"""The operations of a T5Gemma layer in plain PyTorch: the reference for the kernels, and the CPU implementation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.torch_models.t5gemma.weights import Packed


class ReferenceOps:
    """Residual, norm, attention and gate in fp32."""

    def __init__(self, packed: Packed) -> None:
        self._sizes, self._cosine, self._sine = packed.sizes, packed.tensor("cosine"), packed.tensor("sine")

    def enter(self, embedded: Tensor, following: Tensor, split: bool) -> tuple[Tensor, Tensor]:
        """Return the residual (M, width) of embeddings (M, width), and its norm with the weight `following`."""
        hidden = embedded * self._sizes.embedding_scale
        return hidden, product_input(self._norm(hidden, following), split)

    def add_norm(self, hidden: Tensor, stored: Tensor, post: Tensor, following: Tensor, split: bool) -> Tensor:
        """Add the norm (weight `post`) of a result to the residual in place; return the norm `following` of the sum."""
        hidden += self._norm(_whole(stored), post)
        return product_input(self._norm(hidden, following), split)

    def attention(self, stored: Tensor, mask: Tensor, split: bool) -> Tensor:
        """Return the attention of all heads (M, heads * channels) for projected q, k, v; mask (B, T) of 0/1.

        For a key with mask 0 the most negative fp32 is added to the scores, so that its weight is 0.
        """
        sizes = self._sizes
        counts = (sizes.heads, sizes.key_heads, sizes.key_heads)
        blocked = ((1.0 - mask) * torch.finfo(torch.float32).min)[:, None, None, :]
        heads = _whole(stored).unflatten(0, mask.shape).unflatten(-1, (-1, sizes.head_channels)).transpose(1, 2)
        q, k, v = heads.split(counts, dim=1)
        q, k = self._rotated(q), self._rotated(k)
        if sizes.heads != sizes.key_heads:
            k, v = (part.repeat_interleave(sizes.heads // sizes.key_heads, dim=1) for part in (k, v))
        scores = torch.tanh(q @ k.transpose(-1, -2) * sizes.score_scale) * sizes.score_cap
        weights = torch.softmax(scores + blocked, dim=-1)
        return product_input((weights @ v).transpose(1, 2).flatten(2).flatten(0, 1), split)

    def gate(self, stored: Tensor, split: bool) -> Tensor:
        """Return GELU (tanh form) of the first half of the channels, times the second half."""
        gate, value = _whole(stored).chunk(2, dim=-1)
        return product_input(functional.gelu(gate, approximate="tanh") * value, split)

    def _rotated(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * self._cosine + torch.cat([-second, first], dim=-1) * self._sine

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, hidden.shape[-1:], weight, self._sizes.epsilon)


def product_input(value: Tensor, split: bool) -> Tensor:
    """Return (M, K) fp32 as a linear's input: (1, M, K), or (2, M, K) bf16 with the same sum to 2^-17 relative."""
    if not split:
        return value[None]
    high = value.to(torch.bfloat16)
    return torch.stack([high, (value - high).to(torch.bfloat16)])


def _whole(stored: Tensor) -> Tensor:
    return stored[0] if stored.shape[0] == 1 else stored[0] + stored[1]
