"""The forward of a packed T5Gemma encoder in fp32: on a GPU one CUDA graph for each number of rows."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.torch_models.kernels.graphs import Captured
from sa3_trt_core.torch_models.t5gemma.weights import Packed

KEPT_GRAPHS = 4


class Encoder:
    """One packed encoder on one device."""

    def __init__(self, packed: Packed, device: torch.device) -> None:
        self._packed, self._device, self.sizes = packed, device, packed.sizes
        self._graphs: OrderedDict[int, Captured] = OrderedDict()

    def hidden_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features (B, T, width) fp32 on the encoder's device, valid until the next call.

        `ids` and `mask` (B, T) int64 on the CPU; only the embedding's rows of these ids are read.
        """
        inputs = {"embedded": self._packed.rows(ids), "mask": mask.to(torch.float32)}
        if self._device.type != "cuda":
            return self._forward(**inputs)
        rows = ids.shape[0]
        graph = self._graphs.pop(rows, None) or Captured(self._forward, inputs, self._device)
        self._graphs[rows] = graph
        while len(self._graphs) > KEPT_GRAPHS:
            self._graphs.popitem(last=False)
        return graph(inputs)

    def close(self) -> None:
        """Free the graphs."""
        self._graphs.clear()

    def _forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """embedded (B, T, width), mask (B, T) of 0/1: what a key of mask 0 adds to a score leaves it no weight."""
        hidden = embedded * self.sizes.embedding_scale
        blocked = ((1.0 - mask) * torch.finfo(torch.float32).min)[:, None, None, :]
        for index in range(self.sizes.depth):
            base = f"layers.{index}"
            attended = self._attention(base, self._norm(hidden, f"{base}.attention_in.norm"), blocked)
            hidden = hidden + self._norm(attended, f"{base}.attention_out.norm")
            inner = self._product(self._norm(hidden, f"{base}.ff_in.norm"), f"{base}.gate_up")
            gate, value = inner.chunk(2, dim=-1)
            inner = self._product(functional.gelu(gate, approximate="tanh") * value, f"{base}.down")
            hidden = hidden + self._norm(inner, f"{base}.ff_out.norm")
        return self._norm(hidden, "norm")

    def _attention(self, base: str, normed: Tensor, blocked: Tensor) -> Tensor:
        sizes = self.sizes
        counts = (sizes.heads, sizes.key_heads, sizes.key_heads)
        heads = self._product(normed, f"{base}.qkv").unflatten(-1, (-1, sizes.head_channels)).transpose(1, 2)
        q, k, v = heads.split(counts, dim=1)
        q, k = self._rotated(q), self._rotated(k)
        if sizes.heads != sizes.key_heads:
            k, v = (part.repeat_interleave(sizes.heads // sizes.key_heads, dim=1) for part in (k, v))
        scores = torch.tanh(q @ k.transpose(-1, -2) * sizes.score_scale) * sizes.score_cap
        weights = torch.softmax(scores + blocked, dim=-1)
        return self._product((weights @ v).transpose(1, 2).flatten(2), f"{base}.out")

    def _rotated(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        cosine, sine = self._packed.tensor("cosine"), self._packed.tensor("sine")
        return heads * cosine + torch.cat([-second, first], dim=-1) * sine

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        return functional.rms_norm(hidden, hidden.shape[-1:], self._packed.tensor(name), self.sizes.epsilon)

    def _product(self, value: Tensor, name: str) -> Tensor:
        weight = self._packed.tensor(f"{name}.weight")
        if weight.dtype == torch.float32:
            return functional.linear(value, weight)
        return _by_halves(value.flatten(0, -2), weight).unflatten(0, value.shape[:-1])


def _by_halves(value: Tensor, weight: Tensor) -> Tensor:
    """value (M, K) fp32 times weight^T (N, K) bf16 on a GPU, to 1e-5 relative, in fp32.

    A weight of bf16 is exact. The value is the sum of two numbers of bf16 but for 2^-17 of it, and their products are
    added in fp32: a tenth of the time of products in fp32.
    """
    high = value.to(torch.bfloat16)
    low = (value - high).to(torch.bfloat16)
    both = torch.mm(torch.cat([high, low]), weight.t(), out_dtype=torch.float32)
    return both[: value.shape[0]] + both[value.shape[0] :]
