"""Choose the tiles of the SAME kernels by measuring them on the GPU of this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sa3_trt_core.torch_models.kernels.autotune import fastest
from sa3_trt_core.torch_models.same.triton_ops import Tile, Tiles, TritonOps
from sa3_trt_core.torch_models.same.weights import Packed

FRAMES = 646  # latent frames of the measured input
CANDIDATES: dict[str, tuple[Tile, ...]] = {
    "add_norm": (Tile(1, 512, 4), Tile(2, 512, 2), Tile(2, 512, 4), Tile(4, 512, 4), Tile(4, 256, 4)),
    "attention": (
        Tile(32, 64, 2), Tile(32, 64, 2, 168), Tile(32, 64, 4), Tile(32, 64, 4, 128), Tile(32, 64, 4, 96),
        Tile(16, 64, 2), Tile(64, 128, 8), Tile(128, 128, 8),
    ),
    "gate": (Tile(1, 512, 4), Tile(1, 1024, 4), Tile(1, 2048, 8), Tile(2, 512, 4), Tile(4, 512, 4)),
    "gate_codes": (Tile(1, 512, 4), Tile(1, 512, 8), Tile(1, 1024, 4), Tile(1, 1024, 8), Tile(1, 256, 2)),
}  # fmt: skip


def tuned(packed: Packed) -> Tiles:
    """Return the fastest tile of each kernel. A tile that does not fit the GPU is skipped."""
    tiles = Tiles()
    calls = _calls(packed)
    for name, candidates in CANDIDATES.items():

        def call_with(tile: Tile, name: str = name, tiles: Tiles = tiles) -> Callable[[], Any]:
            return partial(calls[name], TritonOps(packed.rates, replace(tiles, **{name: tile})))

        tile = fastest(candidates, call_with)
        if tile is not None:
            tiles = replace(tiles, **{name: tile})
    return tiles


def _calls(packed: Packed) -> dict[str, Callable[[TritonOps], Any]]:
    """Return one call of each kernel on random data."""
    sizes, layer, device = packed.sizes, packed.layers[0], packed.token.device
    tokens = FRAMES * (sizes.stride + 1)

    def half(channels: int) -> Tensor:
        return torch.randn((tokens, channels), device=device).half()

    hidden, branch, qkv, inner = half(sizes.width), half(sizes.width), half(5 * sizes.width), half(2 * sizes.inner)
    return {
        "add_norm": lambda ops: ops.add_norm(hidden, branch, layer.ff_out, None, layer.attention_norm, None),
        "attention": lambda ops: ops.attention(
            qkv, 0, 0, tokens, tokens, sizes.reach, layer.q_norm, layer.k_norm
        ),
        "gate": lambda ops: ops.gate(inner, layer.ff_in, layer.sinusoidal, False),
        "gate_codes": lambda ops: ops.gate(inner, layer.ff_in, layer.sinusoidal, True),
    }  # fmt: skip
