"""U and V of the -xs kinds: singular vectors of the base weight, cached in a folder by the weight's digest.

Adapter files do not contain them; they are computed from the base weights. Singular vectors of nearly equal singular
values are sensitive to small changes of the weight, so those of 16-bit weights differ from those of the fp32 checkpoint
that the adapter was trained on: pass the checkpoint if available.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sa3_trt_core.artifacts import files
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.layers import checkpoint_key
from sa3_trt_core.lora.safetensors_file import FLOATS, SafetensorsFile

if TYPE_CHECKING:
    from torch import Tensor

FOLDER_SUFFIX = ".svd"
KEPT_COLUMNS = 32  # columns cached: -xs adapters have ranks up to 17; a larger rank is cached as it is
_DIGEST_LETTERS = 32


class BasisSource(Protocol):
    """Source of the SVD bases of a layer."""

    def bases(self, layer: str, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return U (out, rank) and V (in, rank) fp32 of a layer's base weight (out, in) in native row order."""
        ...


class SvdBases:
    """Bases of the loaded weights, or of a native checkpoint if `checkpoint` is its model.safetensors.

    `folder` caches the computed bases (None: no cache); a folder that cannot be written is not an error.
    """

    def __init__(self, folder: Path | None = None, checkpoint: Path | None = None) -> None:
        self._file = SafetensorsFile(checkpoint) if checkpoint is not None else None
        if checkpoint is not None:
            folder = checkpoint.with_name(checkpoint.name + FOLDER_SUFFIX)
        self._folder = folder

    def bases(self, layer: str, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return U (out, rank) and V (in, rank) fp32 on the CPU. Raises ToolError if the checkpoint does not fit."""
        source = weight if self._file is None else self._of_checkpoint(layer, tuple(weight.shape))
        wide = source.detach().cpu().float().contiguous()
        columns = max(rank, min(KEPT_COLUMNS, *wide.shape))
        if self._folder is None:
            left, right = thin_svd(wide, columns)
        else:
            left, right = _kept(self._folder, wide, columns)
        return left[:, :rank], right[:, :rank]

    def _of_checkpoint(self, layer: str, shape: tuple[int, ...]) -> Tensor:
        assert self._file is not None
        key = checkpoint_key(layer)
        entry = self._file.entries.get(key)
        if entry is None or entry.dtype not in FLOATS or entry.shape[:2] != shape:
            stated = "is missing" if entry is None else f"has shape {list(entry.shape)}, not {list(shape)}"
            raise ToolError(
                f"{self._file.path}: {key} {stated}", "name the checkpoint that the model was exported from"
            )
        return self._file.tensor(key).reshape(shape)


def thin_svd(weight: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the first columns of U (out, columns) and V (in, columns) of a weight fp32 on the CPU.

    The largest-magnitude entry of each column of U is positive, as in the model's own loader.
    """
    import torch

    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    largest = left.abs().argmax(dim=0)
    signs = left[largest, torch.arange(left.shape[1])].sign()
    signs[signs == 0] = 1
    return (left * signs)[:, :columns].contiguous(), (right * signs[:, None])[:columns].T.contiguous()


def _kept(folder: Path, weight: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the cached bases, or compute and cache them; a damaged cache file is replaced."""
    from safetensors.torch import save_file

    digest = hashlib.sha256(str(tuple(weight.shape)).encode() + weight.numpy().tobytes()).hexdigest()
    path = folder / f"{digest[:_DIGEST_LETTERS]}.safetensors"
    if path.is_file():
        try:
            file = SafetensorsFile(path)
            left, right = file.tensor("U"), file.tensor("V")
            if min(left.shape[1], right.shape[1]) >= columns:
                return left, right
        except (ToolError, KeyError):
            pass
    left, right = thin_svd(weight, columns)
    try:
        with files.atomic_path(path) as temporary:
            save_file({"U": left, "V": right}, str(temporary))
    except OSError:
        pass
    return left, right
