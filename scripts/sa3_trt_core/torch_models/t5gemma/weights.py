"""Weights of the packed T5Gemma encoder: one safetensors file, whose embedding rows are read on demand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from sa3_trt_core.errors import ToolError
from sa3_trt_core.torch_models.kernels import packed_file

FORMAT = "sa3-t5gemma-1"
EMBEDDING = "embedding"
NORMS = ("attention_in", "attention_out", "ff_in", "ff_out")
PRODUCTS = ("qkv", "out", "gate_up", "down")
KINDS = {"BF16": (np.uint16, torch.bfloat16), "F32": (np.float32, torch.float32)}


@dataclass(frozen=True)
class Sizes:
    """Encoder sizes. Scores are `score_cap` * tanh(`score_scale` q k); embeddings are scaled by `embedding_scale`."""

    width: int
    depth: int
    heads: int
    key_heads: int
    head_channels: int
    inner: int
    tokens: int
    vocabulary: int
    epsilon: float
    embedding_scale: float
    score_scale: float
    score_cap: float


class Packed:
    """Tensors of one packed encoder on one device; embedding rows are read on demand.

    `layers.N.qkv.weight` has the rows of q, k, v; `gate_up` those of the gate projection, then the up projection.
    Linear weights are bf16 if the graph's weights are exactly bf16; all else is fp32. Norm weights are the factors by
    which the normalised value is multiplied.
    """

    def __init__(self, sizes: Sizes, tensors: Mapping[str, Tensor], embedding: np.ndarray | Tensor) -> None:
        self.sizes, self._embedding = sizes, embedding
        self._tensors = {name: value if value.is_cuda else value.float() for name, value in tensors.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by their names in a packed file."""
        table = self._embedding if isinstance(self._embedding, Tensor) else torch.from_numpy(self._embedding)
        return {EMBEDDING: table, **self._tensors}

    @classmethod
    def load(cls, path: Path, device: torch.device) -> Self:
        """Load a packed file. Raises ToolError if it is not a packed text encoder or is incomplete."""
        sizes = sizes_of(path)
        tensors = packed_file.read_tensors(path, device, expected(sizes), mapped=(EMBEDDING,))
        return cls(sizes, tensors, _mapped(path, sizes))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its name."""
        return self._tensors[name]

    def rows(self, ids: Tensor) -> Tensor:
        """Return embeddings (B, T, width) fp32 on the CPU for ids (B, T) int64. Raises ToolError for unknown ids."""
        if int(ids.min()) < 0 or int(ids.max()) >= self.sizes.vocabulary:
            raise ToolError(
                f"a token ID of the text is outside the text encoder's vocabulary of {self.sizes.vocabulary}",
                "use the tokenizer and the text encoder of one folder",
            )
        used, place = torch.unique(ids, return_inverse=True)
        table = self._embedding
        if isinstance(table, Tensor):
            return table[used].float()[place]
        read = np.ascontiguousarray(table[used.numpy()])
        return torch.from_numpy(read).view(torch.bfloat16 if read.dtype == np.uint16 else torch.float32).float()[place]


def sizes_of(path: Path) -> Sizes:
    """Return the sizes in the header of a packed file. Raises ToolError."""
    stated: dict[str, Any] = packed_file.read_header(path, FORMAT)
    try:
        return Sizes(**{field.name: stated[field.name] for field in fields(Sizes)})
    except (KeyError, TypeError) as error:
        raise ToolError(f"{path} is not a packed text encoder of this version ({error})", packed_file.REBUILD) from None


def header(sizes: Sizes) -> dict[str, str]:
    """Return the header of a packed file."""
    return packed_file.header(FORMAT, asdict(sizes))


def expected(sizes: Sizes) -> Iterator[str]:
    """Yield the name of every tensor that a packed file with these sizes must contain."""
    yield from (EMBEDDING, "cosine", "sine", "norm")
    for index in range(sizes.depth):
        yield from (f"layers.{index}.{name}.norm" for name in NORMS)
        yield from (f"layers.{index}.{name}.weight" for name in PRODUCTS)


def _mapped(path: Path, sizes: Sizes) -> np.ndarray:
    """Return the embedding table (vocabulary, width), mapped from the file: bf16 as uint16, or fp32."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[EMBEDDING]
    kind, shape = KINDS[entry["dtype"]][0], tuple(entry["shape"])
    if shape != (sizes.vocabulary, sizes.width):
        raise ToolError(f"{path}: the embedding has the shape {shape}", packed_file.REBUILD)
    return np.memmap(path, dtype=kind, mode="r", offset=8 + length + entry["data_offsets"][0], shape=shape)
