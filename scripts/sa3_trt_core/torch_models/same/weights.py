"""Weights of a packed SAME decoder or encoder: one safetensors file, tensors named by role, sizes in its header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sa3_trt_core.errors import ToolError
from sa3_trt_core.number_formats import E4M3_MAX
from sa3_trt_core.torch_models.kernels import packed_file
from sa3_trt_core.torch_models.kernels.linear import Product, fp8_product

FORMAT = "sa3-same-1"
HEAD_CHANNELS = 64  # the kernels support only this size
ROTATED_PAIRS = 16  # of the 32 pairs of channels of a head
NORMS = ("attention_norm", "feed_forward_norm", "q_norm", "k_norm")
PRODUCTS = ("qkv", "attention_out", "ff_in", "ff_out")
BIASED = ("ff_in", "ff_out")
FP8_PRODUCTS = ("ff_in", "ff_out")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a SAME decoder or encoder.

    `kind` is decoder or encoder; a latent frame has `stride` + 1 tokens; attention spans `reach` tokens on either side;
    a token is `patch` samples of every channel; `sinusoidal` lists the layers whose gate is sin(pi g).
    """

    kind: str
    width: int
    depth: int
    heads: int
    inner: int
    stride: int
    reach: int
    patch: int
    latent_channels: int
    sinusoidal: tuple[int, ...]
    precision: str  # of the feed-forward linear layers: fp16 or fp8


@dataclass(frozen=True)
class DynamicTanh:
    """Parameters of gamma * tanh(alpha x) + beta; gamma and beta are (C,) fp32."""

    alpha: float
    gamma: Tensor
    beta: Tensor

    @property
    def bound(self) -> float:
        """Return an upper bound on the magnitude of the result, from |tanh| <= 1."""
        return float((self.gamma.abs() + self.beta.abs()).max())


@dataclass(frozen=True)
class Layer:
    """Weights of one transformer layer, by role."""

    attention_norm: DynamicTanh
    feed_forward_norm: DynamicTanh
    q_norm: DynamicTanh
    k_norm: DynamicTanh
    qkv: Product
    attention_out: Product
    ff_in: Product
    ff_out: Product
    sinusoidal: bool


class Packed:
    """Tensors of one packed SAME decoder or encoder on one device, by role.

    Rows of `qkv` are q1, q2, k1, k2, v; in each head of q and k channel i < 16 is paired with channel i + 32 for the
    rotation, and the others do not rotate. Attention scores do not depend on that order.
    """

    def __init__(self, sizes: Sizes, tensors: Mapping[str, Tensor]) -> None:
        self.sizes = sizes
        self._tensors = dict(tensors)
        self.token = self._tensors["token"]
        self.rates = self._tensors["rates"]
        self.input = self._product("input")
        self.output = self._product("output")
        self.layers = [self._layer(index) for index in range(sizes.depth)]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names in a packed file."""
        return dict(self._tensors)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Load a packed file. Raises ToolError if it is not a packed SAME model or is incomplete."""
        sizes = sizes_of(path)
        return cls(sizes, packed_file.read_tensors(path, device, expected(sizes)))

    def _layer(self, index: int) -> Layer:
        base = f"layers.{index}"
        norms = {name: self._norm(f"{base}.{name}") for name in NORMS}
        return Layer(
            **norms, qkv=self._product(f"{base}.qkv"), attention_out=self._product(f"{base}.attention_out"),
            ff_in=self._product(f"{base}.ff_in", norms["feed_forward_norm"].bound / E4M3_MAX),
            ff_out=self._product(f"{base}.ff_out"), sinusoidal=index in self.sizes.sinusoidal,
        )  # fmt: skip

    def _norm(self, name: str) -> DynamicTanh:
        alpha = float(self._tensors[f"{name}.alpha"])
        return DynamicTanh(alpha, self._tensors[f"{name}.gamma"], self._tensors[f"{name}.beta"])

    def _product(self, name: str, activation_scale: float = 1.0) -> Product:
        weight, bias = self._tensors[f"{name}.weight"], self._tensors.get(f"{name}.bias")
        scale = self._tensors.get(f"{name}.weight_scale")
        if scale is None:
            return Product(weight, bias, None, None, 1.0)
        return fp8_product(weight, scale, bias, activation_scale)


def sizes_of(path: Path) -> Sizes:
    """Return the sizes in the header of a packed file. Raises ToolError."""
    stated: dict[str, Any] = packed_file.read_header(path, FORMAT)
    try:
        values = {field.name: stated[field.name] for field in fields(Sizes)}
        return Sizes(**{**values, "sinusoidal": tuple(values["sinusoidal"])})
    except (KeyError, TypeError) as error:
        raise ToolError(f"{path} is not a packed autoencoder of this version ({error})", packed_file.REBUILD) from None


def header(sizes: Sizes) -> dict[str, str]:
    """Return the header of a packed file."""
    return packed_file.header(FORMAT, asdict(sizes))


def expected(sizes: Sizes) -> Iterator[str]:
    """Yield the name of every tensor that a packed file with these sizes must contain."""
    yield from ("token", "rates", "input.weight", "input.bias", "output.weight", "output.bias")
    for index in range(sizes.depth):
        yield from (f"layers.{index}.{name}.{part}" for name in NORMS for part in ("alpha", "gamma", "beta"))
        yield from (f"layers.{index}.{name}.weight" for name in PRODUCTS)
        yield from (f"layers.{index}.{name}.bias" for name in BIASED)


def paired() -> list[int]:
    """Return the permutation of a head's channels that places rotary pairs (i, i + 16) 32 channels apart."""
    quarter, half = ROTATED_PAIRS, HEAD_CHANNELS // 2
    first, second = list(range(quarter)), list(range(quarter, half))
    return first + list(range(half, half + quarter)) + second + list(range(half + quarter, HEAD_CHANNELS))


def quantized(sizes: Sizes, tensors: Mapping[str, Tensor]) -> tuple[Sizes, dict[str, Tensor]]:
    """Return the sizes and tensors with E4M3 feed-forward weights, one scale per output channel."""
    stored = dict(tensors)
    for index in range(sizes.depth):
        for name in FP8_PRODUCTS:
            key = f"layers.{index}.{name}"
            weight = stored[f"{key}.weight"].float()
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / E4M3_MAX
            stored[f"{key}.weight"] = (weight / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
            stored[f"{key}.weight_scale"] = scale
    return Sizes(**{**asdict(sizes), "precision": "fp8"}), stored
