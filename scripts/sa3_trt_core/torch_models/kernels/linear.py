"""Linear layers in 16 bits or FP8 on any device.

An E4M3 code is an 8-bit float with 3 mantissa bits and the largest value 448. An FP8 weight (N, K) is stored as codes
with one scale per output channel, w = code * scale_w[n]. Its input is quantised to codes with one scale per tensor,
x = code * scale_x; values beyond 448 * scale_x saturate. Tensor cores multiply codes by codes, at twice the rate of
fp16, and add the products in fp32. The sums are stored in fp16; `sum_scale`, a power of two, keeps every possible sum
of K products in fp16's range. The result of the layer is

    stored * ratio + bias,    ratio[n] = scale_x * scale_w[n] / sum_scale

The scales are applied after the sum, because a code times a scale is no longer an E4M3 number. `scaled_mm` returns the
stored values without ratio and bias: the next kernel (triton_ops) applies both while it has the value in a register.
`dequantize` and `linear` apply them here. In 16 bits the stored values lack only the bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.number_formats import E4M3_MAX, FP16_MAX


@dataclass(frozen=True)
class Product:
    """One linear layer: weight (N, K); its result is stored sums * ratio + bias, both (N,) fp32.

    In 16 bits the sums lack only the bias; `ratio` and `activation_scale` are None. In FP8 the activation is quantised
    as x / activation_scale, and the sums are the products of codes times `sum_scale`. With one scale per activation row
    (quantize_rows) `activation_scale` is 1, and the caller multiplies the result by the row scales.
    `watchers` are called with every quantised activation; the list must be empty while a CUDA graph is captured.
    """

    weight: Tensor
    bias: Tensor | None
    ratio: Tensor | None
    activation_scale: float | None
    sum_scale: float
    watchers: list[Callable[[Tensor], None]] = field(default_factory=list, compare=False)

    @property
    def is_fp8(self) -> bool:
        """Return True for E4M3 weights."""
        return self.activation_scale is not None


def sum_scale(terms: int) -> float:
    """Return a power of two that keeps any sum of `terms` products of E4M3 codes in fp16's range.

    The activation and channel scales are applied afterwards in fp32, so that they cannot cause an overflow. What is
    lost below fp16's smallest normal is a millionth of such a sum.
    """
    return 2.0 ** -math.ceil(math.log2(terms * E4M3_MAX * E4M3_MAX / FP16_MAX))


def fp8_product(codes: Tensor, weight_scale: Tensor, bias: Tensor | None, activation_scale: float) -> Product:
    """Return an FP8 linear layer with E4M3 codes (N, K) and one scale per output channel (N,)."""
    scale = sum_scale(codes.shape[1])
    return Product(codes, bias, weight_scale * (activation_scale / scale), activation_scale, scale)


def quantize_activation(value: Tensor, scale: float | None) -> Tensor:
    """Return the input of a linear layer: fp16, or the E4M3 codes of value / scale, saturated."""
    if scale is None:
        return value.to(torch.float16)
    return (value.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_rows(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return E4M3 codes (M, K) and one scale per row (M,) fp32, which maps the row's largest magnitude to 448."""
    scale = value.float().abs().amax(dim=1).clamp(min=1e-12) / E4M3_MAX
    return (value.float() / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def scaled_mm(value: Tensor, product: Product, wide: bool = False, out: Tensor | None = None) -> Tensor:
    """Return the stored sums (..., N), fp16 or fp32 if `wide`, for a quantised (..., K): no ratio or bias applied.

    `out` (M, N) fp16 receives them (default: a new tensor). On a CPU products are computed in fp32: fp16 ones are slow.
    """
    for watcher in product.watchers:
        watcher(value)
    dtype = torch.float32 if wide else torch.float16
    if value.is_cuda:
        flat = value if value.dim() == 2 else value.flatten(0, -2)
        stored = _cuda_scaled_mm(flat, product, dtype, out).unflatten(0, value.shape[:-1])
    else:
        stored = (functional.linear(value.float(), product.weight.float()) * product.sum_scale).to(dtype)
    if out is None or stored.data_ptr() == out.data_ptr():
        return stored
    return out.copy_(stored)


def dequantize(stored: Tensor, product: Product) -> Tensor:
    """Return the linear layer's result in fp32: stored * ratio + bias."""
    scaled = stored.float()
    if product.ratio is not None:
        scaled = scaled * product.ratio
    return scaled if product.bias is None else scaled + product.bias


def linear(value: Tensor, product: Product, wide: bool = False) -> Tensor:
    """Return a linear layer's result, fp16 or fp32 if `wide`, for a value in any precision."""
    value_out = dequantize(scaled_mm(quantize_activation(value, product.activation_scale), product, wide), product)
    return value_out if wide else value_out.to(torch.float16)


def _cuda_scaled_mm(value: Tensor, product: Product, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    weight = product.weight.t()
    if not product.is_fp8:
        if dtype == torch.float32:
            return torch.mm(value, weight, out_dtype=torch.float32)
        return torch.mm(value, weight) if out is None else torch.mm(value, weight, out=out)
    one, scale = _scalars(product.sum_scale, value.device)
    return torch._scaled_mm(value, weight, scale_a=scale, scale_b=one, out_dtype=dtype, use_fast_accum=True)


_SCALARS: dict[tuple[float, torch.device], tuple[Tensor, Tensor]] = {}


def _scalars(scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scalar tensors 1 and `scale`; they are never freed, because captured graphs keep their addresses."""
    if (scale, device) not in _SCALARS:
        _SCALARS[scale, device] = torch.ones((), device=device), torch.full((), scale, device=device)
    return _SCALARS[scale, device]
