"""The operations of a SAME layer as Triton kernels: one pass each, with the results of reference_ops."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.errors import ToolError
from sa3_trt_core.torch_models.kernels.linear import Product
from sa3_trt_core.torch_models.same import triton_kernels as kernels
from sa3_trt_core.torch_models.same.weights import HEAD_CHANNELS, DynamicTanh

MAX_COLUMNS = 512  # positions of the rotary table: more keys than any program reads


@dataclass(frozen=True)
class Tile:
    """Tile of a kernel: rows (tokens), columns (channels, keys), warps, and maximum registers per thread."""

    rows: int
    columns: int
    warps: int
    registers: int | None = None


@dataclass(frozen=True)
class Tiles:
    """Tile of every kernel. The defaults were measured on an H100: build/NOTES.md."""

    add_norm: Tile = Tile(2, 512, 4)
    attention: Tile = Tile(32, 64, 2)
    gate: Tile = Tile(1, 512, 4)
    gate_codes: Tile = Tile(1, 512, 8)
    unpatch: Tile = Tile(4, 0, 4)


def read_tiles(path: Path) -> Tiles:
    """Return the tiles measured for an engine; without such a file the defaults."""
    if not path.is_file():
        return Tiles()
    return Tiles(**{name: Tile(**tile) for name, tile in json.loads(path.read_text()).items()})


class TritonOps:
    """Residual, norm, windowed attention, gate and PCM on an NVIDIA GPU."""

    def __init__(self, rates: Tensor, tiles: Tiles | None = None, approximate: bool = True) -> None:
        """Set `rates` (16,) fp32: radians per token of the rotary pairs.

        `approximate` uses GPU instructions for tanh and sine, which Triton's interpreter does not have.
        """
        self._tiles, self._approximate = tiles or Tiles(), approximate
        angles = torch.outer(torch.arange(MAX_COLUMNS, device=rates.device, dtype=torch.float32), rates)
        # Of the 32 pairs of a head the first 16 rotate; the others have angle 0.
        self._cosine, self._sine = (
            functional.pad(value, (0, HEAD_CHANNELS // 2 - value.shape[1]), value=still).half().contiguous()
            for value, still in ((angles.cos(), 1.0), (angles.sin(), 0.0))
        )

    def norm(self, hidden: Tensor, norm: DynamicTanh, scale: float | None, out: Tensor | None = None) -> Tensor:
        return self._add_norm(hidden, None, None, None, norm, scale, out)

    def add_norm(
        self, hidden: Tensor, stored: Tensor, product: Product, row_scale: Tensor | None, norm: DynamicTanh | None,
        scale: float | None, out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return self._add_norm(hidden, stored, product, row_scale, norm, scale, out)

    def attention(
        self, qkv: Tensor, first: int, begin: int, end: int, tokens: int, reach: int, q_norm: DynamicTanh,
        k_norm: DynamicTanh,
    ) -> Tensor:  # fmt: skip
        heads, tile = qkv.shape[1] // (5 * HEAD_CHANNELS), self._tiles.attention
        queries = min(tile.rows, tile.columns - 2 * reach)
        if queries < 1:
            raise ToolError(f"attention that reaches {reach} tokens has no kernel here", "take another --backend")
        made = torch.empty((end - begin, heads * HEAD_CHANNELS), dtype=torch.float16, device=qkv.device)
        kernels.windowed_attention[(triton.cdiv(end - begin, queries), heads)](
            qkv, made, self._cosine, self._sine, q_norm.gamma, q_norm.beta, k_norm.gamma, k_norm.beta, q_norm.alpha,
            k_norm.alpha, first, begin, end, first + qkv.shape[0], tokens, reach, queries, heads=heads, rows=tile.rows,
            columns=tile.columns, approximate=self._approximate, num_warps=tile.warps, maxnreg=tile.registers,
        )  # fmt: skip
        return made

    def gate(self, stored: Tensor, product: Product, sinusoidal: bool, fp8: bool) -> tuple[Tensor, Tensor | None]:
        count, inner = stored.shape[0], stored.shape[1] // 2
        ratio = stored if product.ratio is None else product.ratio
        has_ratio = product.ratio is not None
        if not fp8:
            tile = self._tiles.gate
            made = torch.empty((count, inner), dtype=torch.float16, device=stored.device)
            kernels.gate[(triton.cdiv(count, tile.rows), triton.cdiv(inner, tile.columns))](
                stored, ratio, product.bias, made, count, inner=inner, rows=tile.rows, block=tile.columns,
                sinusoidal=sinusoidal, has_ratio=has_ratio, approximate=self._approximate, num_warps=tile.warps,
            )  # fmt: skip
            return made, None
        tile = self._tiles.gate_codes
        codes = torch.empty((count, inner), dtype=torch.float8_e4m3fn, device=stored.device)
        scale = torch.empty(count, device=stored.device)
        kernels.gate_codes[(count,)](
            stored, ratio, product.bias, codes, scale, count, inner=inner, pieces=triton.cdiv(inner, tile.columns),
            block=tile.columns, sinusoidal=sinusoidal, has_ratio=has_ratio, approximate=self._approximate,
            num_warps=tile.warps,
        )  # fmt: skip
        return codes, scale

    def pcm(self, patches: Tensor, bias: Tensor, stride: int, channels: int) -> Tensor:
        return self._unpatched(patches, bias, stride, channels, torch.int16)

    def samples(self, patches: Tensor, bias: Tensor, stride: int, channels: int) -> Tensor:
        return self._unpatched(patches, bias, stride, channels, torch.float32)

    def _add_norm(
        self, hidden: Tensor, stored: Tensor | None, product: Product | None, row_scale: Tensor | None,
        norm: DynamicTanh | None, scale: float | None, out: Tensor | None,
    ) -> Tensor:  # fmt: skip
        count, width = hidden.shape
        tile = self._tiles.add_norm
        made = hidden
        if norm is not None:
            kind = torch.float16 if scale is None else torch.float8_e4m3fn
            made = out if out is not None else torch.empty(hidden.shape, dtype=kind, device=hidden.device)
        ratio = None if product is None else product.ratio
        bias = None if product is None else product.bias
        block = min(tile.columns, width & -width)
        kernels.add_norm[(triton.cdiv(count, tile.rows), triton.cdiv(width, block))](
            hidden, _or(stored, hidden), _or(ratio, hidden), _or(row_scale, hidden), _or(bias, hidden),
            hidden if norm is None else norm.gamma, hidden if norm is None else norm.beta, made,
            0.0 if norm is None else norm.alpha, 1.0 if scale is None else 1.0 / scale, count, width=width,
            rows=tile.rows, block=block, has_sums=stored is not None, has_ratio=ratio is not None,
            has_row_scale=row_scale is not None, has_bias=bias is not None, has_norm=norm is not None,
            to_fp8=scale is not None, num_warps=tile.warps,
        )  # fmt: skip
        return made

    def _unpatched(self, patches: Tensor, bias: Tensor, stride: int, channels: int, kind: torch.dtype) -> Tensor:
        patch, tile = patches.shape[1] // channels, self._tiles.unpatch
        if channels != 2 or patch & (patch - 1):
            raise ToolError(f"{channels} channels in patches of {patch} have no kernel here", "take another --backend")
        count = patches.shape[0] // (stride + 1) * stride
        made = torch.empty((count * patch, channels), dtype=kind, device=patches.device)
        kernels.unpatch[(triton.cdiv(count, tile.rows),)](
            patches, bias, made, count, stride=stride, patch=patch, rows=tile.rows, to_pcm=kind == torch.int16,
            num_warps=tile.warps,
        )  # fmt: skip
        return made


def _or(value: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return `value`, or `stand_in` as a pointer that the kernel does not read."""
    return stand_in if value is None else value
