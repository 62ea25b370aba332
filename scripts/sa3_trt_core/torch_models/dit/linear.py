"""A weighted product of the packed DiT, in 16 bits or FP8, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sa3_trt_core.number_formats import E4M3_MAX
from sa3_trt_core.torch_models.dit.weights import Product


def coded(value: Tensor, scale: float | None) -> Tensor:
    """What a product reads: fp16, or the E4M3 codes of value / scale, saturated."""
    if scale is None:
        return value.to(torch.float16)
    return (value.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def sums(value: Tensor, product: Product) -> Tensor:
    """The stored sums (..., N) fp16 of a coded (..., K): what lacks ratio and bias."""
    if value.is_cuda:
        return _gpu_sums(value.flatten(0, -2), product).unflatten(0, value.shape[:-1])
    return (functional.linear(value.float(), product.weight.float()) * product.sum_scale).to(torch.float16)


def finished(stored: Tensor, product: Product) -> Tensor:
    """The result in fp32 of stored sums."""
    found = stored.float()
    if product.ratio is not None:
        found = found * product.ratio
    return found if product.bias is None else found + product.bias


def result(value: Tensor, product: Product) -> Tensor:
    """A product's whole result in fp16, of a value in any precision."""
    return finished(sums(coded(value, product.activation_scale), product), product).to(torch.float16)


def _gpu_sums(value: Tensor, product: Product) -> Tensor:
    if product.activation_scale is None:
        return value @ product.weight.t()
    one, scale = _scalars(product.sum_scale, value.device)
    return torch._scaled_mm(
        value, product.weight.t(), scale_a=scale, scale_b=one, out_dtype=torch.float16, use_fast_accum=True
    )


_SCALARS: dict[tuple[float, torch.device], tuple[Tensor, Tensor]] = {}


def _scalars(scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two one-element tensors that a captured graph may keep the addresses of."""
    if (scale, device) not in _SCALARS:
        _SCALARS[scale, device] = torch.ones((), device=device), torch.full((), scale, device=device)
    return _SCALARS[scale, device]
