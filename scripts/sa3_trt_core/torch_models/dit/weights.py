"""Weights of the packed DiT: one safetensors file with tensors named by role and the sizes in its header."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from sa3_trt_core.errors import ToolError
from sa3_trt_core.torch_models.kernels.linear import Product, fp8_product

FORMAT = "sa3-dit-1"
HEAD_CHANNELS = 64  # the kernels support only this size
BLOCK_PRODUCTS = (
    "self_qkv", "self_out", "cross_q", "cross_kv", "cross_out", "ff_in", "ff_out", "local_in", "local_out"
)  # fmt: skip
BLOCK_NORMS = ("self_norm", "cross_norm", "ff_norm", "self_q_norm", "self_k_norm", "cross_q_norm", "cross_k_norm")
ENDS = ("input", "output", "context_in", "context_out")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a packed DiT: its widths, its norms' epsilons, the longest duration (s) and properties of its graph."""

    width: int
    depth: int
    heads: int
    inner: int
    memory: int
    norm_epsilon: float
    head_epsilon: float
    seconds_range: float
    null_rows: bool  # a row whose t5_hidden and t5_mask are zero has zero cross tokens
    precision: str
    angular: bool = False  # the duration's frequencies include the factor 2 pi


class Packed:
    """Tensors of one packed DiT on one device, by role."""

    def __init__(self, sizes: Sizes, tensors: Mapping[str, Tensor]) -> None:
        self.sizes = sizes
        self._tensors = dict(tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names in a packed file."""
        return dict(self._tensors)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Load a packed file. Raises ToolError if it is not a packed DiT or is incomplete."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                sizes = _sizes(path, file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise ToolError(f"{path} is not a complete packed DiT ({error})", "build it again") from None
        missing = sorted(set(expected(sizes)) - set(tensors))
        if missing:
            raise ToolError(f"{path}: tensor {missing[0]} is missing", "build it again")
        return cls(sizes, tensors)

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of all tensors."""
        return tuple(self._tensors)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor that belongs to no linear layer."""
        return self._tensors[name]

    def product(self, name: str) -> Product:
        """Return a linear layer by its role."""
        weight = self._tensors[f"{name}.weight"]
        bias = self._tensors.get(f"{name}.bias")
        if f"{name}.activation_scale" not in self._tensors:
            return Product(weight, bias, None, None, 1.0)
        activation = float(self._tensors[f"{name}.activation_scale"])
        return fp8_product(weight, self._tensors[f"{name}.weight_scale"], bias, activation)


def expected(sizes: Sizes) -> Iterator[str]:
    """Yield the name of every tensor that a packed file with these sizes must contain."""
    yield from ("padding", "memory", "cosine", "sine", "preprocess", "postprocess")
    yield from ("time.frequencies", "seconds.frequencies")
    for layer in ("time.0", "time.2", "seconds", "modulation.0", "modulation.2"):
        yield from (f"{layer}.weight", f"{layer}.bias")
    yield from ("global.0.weight", "global.2.weight")
    yield from (f"{name}.weight" for name in ENDS)
    for block in range(sizes.depth):
        yield from (f"blocks.{block}.{name}.weight" for name in BLOCK_PRODUCTS)
        yield from (f"blocks.{block}.{name}.bias" for name in ("ff_in", "ff_out", "local_in", "local_out"))
        yield from (f"blocks.{block}.{name}" for name in (*BLOCK_NORMS, "modulation"))


def header(sizes: Sizes) -> dict[str, str]:
    """Return the header of a packed file."""
    return {"format": FORMAT, "sizes": json.dumps(asdict(sizes), sort_keys=True)}


def _sizes(path: Path, metadata: dict[str, str]) -> Sizes:
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}")
        stated: dict[str, Any] = json.loads(metadata["sizes"])
        needed = [field for field in fields(Sizes) if field.name in stated or field.default is MISSING]
        return Sizes(**{field.name: stated[field.name] for field in needed})
    except (KeyError, TypeError, ValueError) as error:
        raise ToolError(f"{path} is not a packed DiT of this version ({error})", "build it again") from None
