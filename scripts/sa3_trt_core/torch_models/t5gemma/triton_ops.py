"""The operations of a T5Gemma layer as Triton kernels: one or two passes each, with the results of reference_ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sa3_trt_core.torch_models.t5gemma import triton_kernels as kernels
from sa3_trt_core.torch_models.t5gemma.weights import Packed

TF32_CAPABILITY = (8, 0)
ROTATED_TOKENS = 16  # tokens per program of `rotate`
GATE_CHANNELS = 1024  # channels per program of `gate`
MIN_DOT_SIZE = 16  # minimum rows, columns and channels of tl.dot


@dataclass(frozen=True)
class Tile:
    """Tile of the attention kernel: queries, keys at a time, warps, and pipeline stages (blocks of keys in flight)."""

    queries: int = 32
    keys: int = 64
    warps: int = 4
    stages: int = 2


class TritonOps:
    """Residual, norm, attention and gate on an NVIDIA GPU."""

    def __init__(self, packed: Packed, tile: Tile | None = None) -> None:
        self._sizes, self._tile = packed.sizes, tile or Tile()
        self._cosine, self._sine = (packed.tensor(name).contiguous() for name in ("cosine", "sine"))
        device = self._cosine.device
        has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY
        self._precision = "tf32x3" if has_tf32 else "ieee"

    def enter(self, embedded: Tensor, following: Tensor, split: bool) -> tuple[Tensor, Tensor]:
        hidden = torch.empty_like(embedded)
        return hidden, self._add_norm(embedded, None, following, following, hidden, split)

    def add_norm(self, hidden: Tensor, stored: Tensor, post: Tensor, following: Tensor, split: bool) -> Tensor:
        return self._add_norm(hidden, stored, post, following, hidden, split)

    def attention(self, stored: Tensor, mask: Tensor, split: bool) -> Tensor:
        sizes, tile = self._sizes, self._tile
        (rows, tokens), channels = mask.shape, sizes.head_channels
        block = max(MIN_DOT_SIZE, triton.next_power_of_2(channels))
        qkv = self._rotated(stored, tokens, block)
        result = _product_input((rows * tokens, sizes.heads * channels), split, stored.device)
        # Heads over 64 channels take smaller tiles: with 256 channels, 32 queries exceed the shared memory of sm_86.
        queries, keys = (min(side, max(MIN_DOT_SIZE, side * 64 // block)) for side in (tile.queries, tile.keys))
        kernels.attention[(triton.cdiv(tokens, queries), sizes.heads, rows)](
            qkv, mask, result, sizes.score_scale, sizes.score_cap, tokens=tokens, heads=sizes.heads,
            key_heads=sizes.key_heads, channels=channels, block=block, rows=queries, columns=keys,
            precision=self._precision, split=split, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return result

    def gate(self, stored: Tensor, split: bool) -> Tensor:
        halves, count, channels = stored.shape
        inner = channels // 2
        result = _product_input((count, inner), split, stored.device)
        block = min(GATE_CHANNELS, triton.next_power_of_2(inner))
        kernels.gate[(count, triton.cdiv(inner, block))](
            stored, result, count, inner=inner, block=block, halves=halves == 2, split=split, num_warps=4
        )
        return result

    def _rotated(self, stored: Tensor, tokens: int, block: int) -> Tensor:
        """Return the heads of q, k and v (M, number of heads * channels) fp32 of a result, with q and k rotated."""
        sizes, (halves, count, width) = self._sizes, stored.shape
        made = torch.empty((count, width), device=stored.device)
        heads = sizes.heads + 2 * sizes.key_heads
        kernels.rotate[(triton.cdiv(count, ROTATED_TOKENS), heads)](
            stored, self._cosine, self._sine, made, count, tokens=tokens, rotated=sizes.heads + sizes.key_heads,
            heads=heads, channels=sizes.head_channels, rows=ROTATED_TOKENS, block=block, halves=halves == 2,
            num_warps=4,
        )  # fmt: skip
        return made

    def _add_norm(
        self, source: Tensor, stored: Tensor | None, post: Tensor, following: Tensor, hidden: Tensor, split: bool
    ) -> Tensor:
        count, width = source.shape
        result = _product_input((count, width), split, source.device)
        kernels.add_norm[(count,)](
            source, source if stored is None else stored, post, following, hidden, result, count,
            self._sizes.embedding_scale, self._sizes.epsilon, width=width, block=triton.next_power_of_2(width),
            has_branch=stored is not None, halves=stored is not None and stored.shape[0] == 2, split=split, num_warps=4,
        )  # fmt: skip
        return result


def _product_input(shape: tuple[int, int], split: bool, device: torch.device) -> Tensor:
    """Return uninitialised memory for a linear's input: (1, M, K) fp32, or the halves (2, M, K) bf16."""
    dtype = torch.bfloat16 if split else torch.float32
    return torch.empty((2 if split else 1, *shape), dtype=dtype, device=device)
