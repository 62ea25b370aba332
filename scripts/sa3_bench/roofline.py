"""Lower bound of a step's time: its operations and bytes divided by this GPU's peak rates, measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sa3_bench.timing import median_ms
from sa3_trt_core.torch_models.dit.weights import HEAD_CHANNELS, Sizes

SIDE = 8192  # of the square GEMMs that measure the peak rates
COPY_BYTES = 1 << 30
CROSS_TOKENS = 257


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of the GPU: FP8 and fp16 GEMMs in TFLOP/s, device memory in TB/s (bytes read and written)."""

    fp8: float
    fp16: float
    memory: float


@dataclass(frozen=True)
class Work:
    """A step's TFLOP in linear layers and in attention, and the TB of weights that it must read."""

    products: float
    attention: float
    weights: float


def work_of(sizes: Sizes, rows: int, frames: int) -> Work:
    """Return the work of one step, without computations independent of x and t, which are cached."""
    tokens, width = rows * (frames + sizes.memory), sizes.width
    per_block = width * width * (5 + 1 + 2 + 1) + 3 * width * sizes.inner
    products = 2 * tokens * per_block * sizes.depth + 4 * rows * frames * width * 256
    keys = frames + sizes.memory + CROSS_TOKENS
    attention = 2 * 2 * 2 * tokens * keys * sizes.heads * HEAD_CHANNELS * sizes.depth
    one = 1 if sizes.precision == "fp8" else 2
    return Work(products / 1e12, attention / 1e12, per_block * sizes.depth * one / 1e12)


def floor_ms(work: Work, ceilings: Ceilings, precision: str) -> float:
    """Return the lower bound in ms: arithmetic (linear layers, attention in 16 bits) or one read of the weights."""
    rate = ceilings.fp8 if precision == "fp8" else ceilings.fp16
    return 1e3 * max(work.products / rate + work.attention / ceilings.fp16, work.weights / ceilings.memory)


def measure(device: torch.device) -> Ceilings:
    """Measure the GPU's peak rates on random data."""
    half = torch.randn(SIDE, SIDE, device=device).half()
    codes = torch.randn(SIDE, SIDE, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    flop = 2 * SIDE**3 / 1e12
    fp16 = 1e3 * flop / median_ms(lambda: half @ half.t(), 20)

    def product() -> torch.Tensor:
        return torch._scaled_mm(codes, codes.t(), one, one, out_dtype=torch.float16, use_fast_accum=True)

    fp8 = 1e3 * flop / median_ms(product, 20)
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory = 1e3 * 2 * COPY_BYTES / 1e12 / median_ms(lambda: target.copy_(source), 20)
    return Ceilings(fp8, fp16, memory)
