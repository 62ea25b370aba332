"""Choose the tiles of the kernels by measuring them on this machine's GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sa3_trt_core.shapes import MAX_FRAMES
from sa3_trt_core.torch_models.dit.triton_ops import ByLength, FusedOps, Tile, Tiles
from sa3_trt_core.torch_models.dit.weights import HEAD_CHANNELS, Sizes
from sa3_trt_core.torch_models.kernels.autotune import fastest

SHORT, LONG = 646, 4096  # latent frames measured for each range of lengths
CROSS_TOKENS = 257
NO_BOUND = 12.0  # bound on attention scores; small enough for the kernel with a fixed subtrahend
SCALE = 0.02
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "self_attention": (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, 168), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3, 128),
        Tile(64, 128, 4, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 128, 8, 2), Tile(128, 32, 8, 3),
    ),
    "cross_attention": (
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, 168), Tile(64, 32, 4, 3), Tile(64, 128, 4, 2), Tile(128, 64, 8, 2),
        Tile(32, 64, 2, 2),
    ),
    "norm": (Tile(1, 0, 8), Tile(2, 0, 4), Tile(2, 0, 8), Tile(4, 0, 4), Tile(4, 0, 8)),
    "rope": (Tile(8, 0, 1), Tile(16, 0, 2), Tile(16, 0, 1), Tile(32, 0, 2), Tile(32, 0, 4)),
    "gated": (Tile(1, 1024, 8), Tile(1, 512, 4), Tile(1, 1024, 4), Tile(1, 2048, 8), Tile(2, 512, 4)),
}  # fmt: skip


def tuned(sizes: Sizes, device: torch.device) -> ByLength:
    """Return each kernel's fastest tile for short and for long latents. A tile that does not fit the GPU is skipped."""
    return ByLength(*(_best(sizes, frames + sizes.memory, device) for frames in (SHORT, LONG)))


def _best(sizes: Sizes, tokens: int, device: torch.device) -> Tiles:
    tiles = Tiles()
    calls = _calls(sizes, tokens, device)
    tables = torch.ones((MAX_FRAMES + sizes.memory, HEAD_CHANNELS // 2), device=device)
    for name, candidates in CANDIDATES.items():

        def call_with(tile: Tile, name: str = name, tiles: Tiles = tiles) -> Callable[[], Any]:
            chosen = replace(tiles, **{name: tile})
            return partial(calls[name], FusedOps(tables, tables, ByLength(chosen, chosen)))

        tile = fastest(candidates, call_with)
        if tile is not None:
            tiles = replace(tiles, **{name: tile})
    return tiles


def _calls(sizes: Sizes, tokens: int, device: torch.device) -> dict[str, Callable[[FusedOps], Any]]:
    """Return one call of each kernel on random data with `tokens` tokens."""
    width, scale = sizes.width, SCALE if sizes.precision == "fp8" else None

    def half(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).half()

    qkv, q, both = half(1, tokens, 5 * width), half(1, tokens, 2 * width), half(1, tokens, 2 * sizes.inner)
    keys, hidden, branch = half(1, CROSS_TOKENS, 3 * width), half(1, tokens, width), half(1, tokens, width)
    vector, bias = torch.ones((1, width), device=device), torch.ones(2 * sizes.inner, device=device)
    ratio, gamma = torch.ones(5 * width, device=device), torch.ones(HEAD_CHANNELS, device=device)

    def attend(ops: FusedOps) -> Tensor:
        return ops.self_attention(qkv, ratio, gamma, gamma, 1e-6, NO_BOUND, scale)

    return {
        "self_attention": attend,
        "cross_attention": lambda ops: ops.cross_attention(q, ratio, keys, gamma, 1e-6, NO_BOUND, scale),
        "norm": lambda ops: ops.add_normed(hidden, branch, vector, vector, None, 0, vector, vector, 1e-6, scale),
        "rope": attend,
        "gated": lambda ops: ops.gated(both, ratio.new_ones(2 * sizes.inner), bias, scale),
    }
