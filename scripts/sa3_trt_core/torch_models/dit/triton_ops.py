"""The operations of a DiT block as Triton kernels: one pass each, with the results of reference_ops."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from sa3_trt_core.torch_models.dit import triton_kernels
from sa3_trt_core.torch_models.dit.weights import HEAD_CHANNELS

LOG2_E = 1.0 / math.log(2.0)
MAX_WEIGHT = 15.0  # log2 of the largest attention weight with a fixed subtrahend; fp16 overflows at 2^16
MAX_BOUND = 20.0  # in powers of two: a score this far below 0 still has a nonzero weight in fp16


@dataclass(frozen=True)
class Tile:
    """Tile of a kernel: rows (tokens, queries, heads) and columns (channels, keys) per program, warps, pipeline
    stages (blocks of keys in flight), and maximum registers per thread."""

    rows: int
    columns: int
    warps: int
    stages: int = 2
    registers: int | None = None


@dataclass(frozen=True)
class Tiles:
    """Tile of every kernel. The defaults were measured on an H100: build/NOTES.md."""

    self_attention: Tile = Tile(64, 64, 4, 2)
    cross_attention: Tile = Tile(64, 64, 4, 2)
    norm: Tile = Tile(2, 0, 4)
    rope: Tile = Tile(16, 0, 2)
    gated: Tile = Tile(1, 1024, 8)


LONG_TOKENS = 2048  # tokens of all rows together, from which the tiles for long latents are used


@dataclass(frozen=True)
class ByLength:
    """Tiles for few tokens and for many."""

    short: Tiles = Tiles()
    long: Tiles = Tiles(self_attention=Tile(128, 32, 8, 3), rope=Tile(8, 0, 1))

    def at(self, hidden: Tensor) -> Tiles:
        """Return the tiles for a tensor (B, T, ...)."""
        return self.short if hidden.shape[0] * hidden.shape[1] < LONG_TOKENS else self.long


def read_tiles(path: Path) -> ByLength:
    """Return the tiles measured for a packed DiT; without such a file the defaults, measured on an H100."""
    if not path.is_file():
        return ByLength()
    stated = json.loads(path.read_text())
    return ByLength(
        *(Tiles(**{name: Tile(**tile) for name, tile in stated[kind].items()}) for kind in ("short", "long"))
    )


class FusedOps:
    """Residual, norm, attention and gate on an NVIDIA GPU."""

    def __init__(self, cosine: Tensor, sine: Tensor, tiles: ByLength | None = None) -> None:
        """Set the rotary table: `cosine`, `sine` (positions, 32) fp32."""
        self._cosine, self._sine = cosine.contiguous(), sine.contiguous()
        self._tiles = tiles or ByLength()

    def normed(
        self, hidden: Tensor, gain: Tensor, shift: Tensor | None, epsilon: float, activation_scale: float | None
    ) -> Tensor:
        return self._residual_norm(hidden, None, None, None, None, 0, gain, shift, epsilon, activation_scale)[1]

    def add_normed(
        self, hidden: Tensor, stored: Tensor, multiplier: Tensor | None, addend: Tensor | None, local: Tensor | None,
        memory: int, gain: Tensor | None, shift: Tensor | None, epsilon: float, activation_scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return self._residual_norm(
            hidden, stored, multiplier, addend, local, memory, gain, shift, epsilon, activation_scale
        )

    def self_attention(
        self, stored: Tensor, ratio: Tensor | None, q_gamma: Tensor, k_gamma: Tensor, epsilon: float, bound: float,
        activation_scale: float | None,
    ) -> Tensor:  # fmt: skip
        rows, tokens, channels = stored.shape
        heads = channels // 5 // HEAD_CHANNELS
        width, tile = heads * HEAD_CHANNELS, self._tiles.at(stored).rope
        turned = torch.empty((rows, tokens, 4 * width), dtype=torch.float16, device=stored.device)
        triton_kernels.norm_rope[(rows * tokens, triton.cdiv(4 * heads, tile.rows))](
            stored, _or(ratio, stored), q_gamma, k_gamma, self._cosine, self._sine, turned, tokens, epsilon,
            heads=heads, stride=5 * width, block=tile.rows, has_ratio=ratio is not None, num_warps=tile.warps,
        )  # fmt: skip
        value_ratio = None if ratio is None else ratio[4 * width :]
        return _attention(
            turned, turned[..., 2 * width :], stored[..., 4 * width :], None, None, value_ratio, tokens,
            (4 * width, 4 * width, 5 * width), heads, epsilon, bound, activation_scale,
            self._tiles.at(stored).self_attention,
        )  # fmt: skip

    def cross_attention(
        self, stored: Tensor, ratio: Tensor | None, keys: Tensor, q_gamma: Tensor, epsilon: float, bound: float,
        activation_scale: float | None,
    ) -> Tensor:  # fmt: skip
        width = stored.shape[-1] // 2
        return _attention(
            stored, keys, keys[..., 2 * width :], ratio, q_gamma, None, keys.shape[1],
            (2 * width, 3 * width, 3 * width), width // HEAD_CHANNELS, epsilon, bound, activation_scale,
            self._tiles.at(stored).cross_attention,
        )  # fmt: skip

    def gated(self, stored: Tensor, ratio: Tensor | None, bias: Tensor, activation_scale: float | None) -> Tensor:
        inner, count, tile = stored.shape[-1] // 2, stored.shape[0] * stored.shape[1], self._tiles.at(stored).gated
        made = torch.empty((*stored.shape[:-1], inner), dtype=_kind(activation_scale), device=stored.device)
        triton_kernels.gated[(triton.cdiv(count, tile.rows), triton.cdiv(inner, tile.columns))](
            stored, _or(ratio, stored), bias, made, _inverse(activation_scale), count, inner=inner, rows=tile.rows,
            block=tile.columns, has_ratio=ratio is not None, to_fp8=activation_scale is not None,
            num_warps=tile.warps,
        )  # fmt: skip
        return made

    def _residual_norm(
        self, hidden: Tensor, stored: Tensor | None, multiplier: Tensor | None, addend: Tensor | None,
        local: Tensor | None, memory: int, gain: Tensor | None, shift: Tensor | None, epsilon: float,
        activation_scale: float | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows, tokens, width = hidden.shape
        tile = self._tiles.at(hidden).norm
        total = torch.empty_like(hidden) if stored is not None else hidden
        made = total if gain is None else torch.empty(
            hidden.shape, dtype=_kind(activation_scale), device=hidden.device
        )  # fmt: skip
        triton_kernels.residual_norm[(triton.cdiv(tokens, tile.rows), rows)](
            hidden, _or(stored, hidden), _or(multiplier, hidden), _or(addend, hidden), _or(local, hidden),
            _or(gain, hidden), _or(shift, hidden), total, made, _inverse(activation_scale), tokens, memory,
            _step(local, 0), _step(local, 1), _step(multiplier, 0), _step(gain, 0), epsilon, width=width,
            rows=tile.rows, block=triton.next_power_of_2(width), has_sums=stored is not None,
            has_multiplier=multiplier is not None, has_addend=addend is not None, has_local=local is not None,
            has_norm=gain is not None, has_shift=shift is not None, to_fp8=activation_scale is not None,
            num_warps=tile.warps,
        )  # fmt: skip
        return total, made


def _attention(
    query: Tensor, key: Tensor, value: Tensor, query_ratio: Tensor | None, query_gamma: Tensor | None,
    value_ratio: Tensor | None, keys: int, strides: tuple[int, int, int], heads: int, epsilon: float,
    bound: float, activation_scale: float | None, tile: Tile,
) -> Tensor:  # fmt: skip
    rows, tokens = query.shape[:2]
    made = torch.empty((rows, tokens, heads * HEAD_CHANNELS), dtype=_kind(activation_scale), device=query.device)
    subtracted = bound * LOG2_E - MAX_WEIGHT if bound * LOG2_E <= MAX_BOUND else None
    triton_kernels.differential_attention[(triton.cdiv(tokens, tile.rows), heads, rows)](
        query, key, value, _or(query_ratio, query), _or(query_gamma, query), _or(value_ratio, query), made,
        _inverse(activation_scale), tokens, keys, epsilon, subtracted or 0.0, heads=heads, query_stride=strides[0],
        key_stride=strides[1], value_stride=strides[2], rows=tile.rows, columns=tile.columns,
        norm_query=query_gamma is not None, has_query_ratio=query_ratio is not None,
        has_value_ratio=value_ratio is not None, bounded=subtracted is not None,
        to_fp8=activation_scale is not None, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    return made


def _or(value: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return `value`, or `stand_in` as a pointer that the kernel does not read."""
    return stand_in if value is None else value


def _kind(activation_scale: float | None) -> torch.dtype:
    return torch.float16 if activation_scale is None else torch.float8_e4m3fn


def _inverse(activation_scale: float | None) -> float:
    return 1.0 if activation_scale is None else 1.0 / activation_scale


def _step(local: Tensor | None, axis: int) -> int:
    """Return the stride of an axis of (B or 1, L or 1, width): 0 for an axis of size 1."""
    return 0 if local is None or local.shape[axis] == 1 else local.stride(axis)
