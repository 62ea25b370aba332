"""Tensors of a native checkpoint's safetensors file, by their native names."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sa3_trt_core.errors import ToolError, memory_error
from sa3_trt_core.lora.layers import layer_of_checkpoint_key
from sa3_trt_core.lora.lora_set import LoraSet
from sa3_trt_core.lora.svd_bases import FOLDER_SUFFIX, SvdBases

WEIGHTS_FILE = "model.safetensors"
DIT_PREFIX = "model.model."
CONDITIONER_PREFIX = "conditioner."
AUTOENCODER_PREFIX = "pretransform.model."
# Buffers that the native file stores and diffusers derives, or that have no elements.
DERIVED_SUFFIXES = (".rope.inv_freq", "bottleneck.noise_scaling_factor")


PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # PyTorch's zip format, and the one before 1.6


class NativeWeights:
    """Tensors of one model.safetensors, read by native key.

    Raises ToolError when the file is missing, incomplete or not safetensors.
    """

    def __init__(self, path: Path, loras: LoraSet | None = None) -> None:
        """Open the file; `loras` are merged into the weights as they are read."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ToolError(f"no such checkpoint file: {path}", f"give the {WEIGHTS_FILE} of a native checkpoint")
        if _is_pickle(path):
            raise _pickled(path)
        self._open = lambda: safe_open(str(path), framework="pt", device="cpu")
        try:
            self._opened: Any = self._open()
        except (SafetensorError, OSError) as error:
            if path.suffix.lower() in PICKLED:
                raise _pickled(path) from None
            raise memory_error(error) or ToolError(
                f"{path} is not a complete safetensors file ({error})", "download or export it again"
            ) from None
        self._path = path
        self.keys = frozenset(self._file.keys())
        for key in sorted(self.keys):
            if not key.startswith((DIT_PREFIX, AUTOENCODER_PREFIX, CONDITIONER_PREFIX)):
                raise ToolError(f"{path}: unexpected tensor {key}", "this is not a native Stable Audio 3 checkpoint")
        self._loras = loras or LoraSet()
        self._bases = SvdBases(path.with_name(path.name + FOLDER_SUFFIX)) if self._loras else None
        if self._loras:
            self._loras.require_fits(self._layer_shapes(), str(path))

    def _layer_shapes(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of every weight that an adapter may change."""
        shapes = {}
        for key in self.keys:
            layer, shape = layer_of_checkpoint_key(key), tuple(self._file.get_slice(key).get_shape())
            if layer is not None and len(shape) > 1:
                shapes[layer] = (shape[0], shape[1])
        return shapes

    def release(self) -> None:
        """Close the memory-mapped file, whose pages stay resident until then; it is reopened when needed."""
        self._opened = None

    @property
    def _file(self) -> Any:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def take(self, key: str, shape: torch.Size) -> torch.Tensor:
        """Return one tensor in fp32. Raises ToolError naming the key when it is missing or has another shape."""
        self.require(key, shape)
        tensor: torch.Tensor = self._file.get_tensor(key)
        return self._adapted(key, tensor.to(torch.float32))

    def copy(self, key: str, shape: torch.Size) -> torch.Tensor:
        """Return one tensor in fp32, read instead of memory-mapped.

        For a tensor that is rearranged: mapped, it would be in memory twice.
        """
        self.require(key, shape)
        if self._file.get_slice(key).get_dtype() != "F32":
            return self.take(key, shape)
        with self._path.open("rb") as file:  # safetensors: length of the header, the header, the data
            length = int.from_bytes(file.read(8), "little")
            start, end = json.loads(file.read(length))[key]["data_offsets"]
            file.seek(8 + length + start)
            tensor = torch.frombuffer(bytearray(file.read(end - start)), dtype=torch.float32).reshape(shape)
        return self._adapted(key, tensor)

    def _adapted(self, key: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a weight with the adapters merged; a convolution's weight is merged as a matrix."""
        layer = layer_of_checkpoint_key(key)
        if layer is None or layer not in self._loras.layers:
            return tensor
        return self._loras.merged(layer, tensor.flatten(1), self._bases).reshape(tensor.shape)

    def require(self, key: str, shape: torch.Size) -> None:
        """Raise ToolError naming the key when a tensor is missing or has another shape; reads only the header."""
        if key not in self.keys:
            raise ToolError(
                f"{self._path}: tensor {key} is missing", "the checkpoint does not fit its model_config.json"
            )
        actual_shape = tuple(self._file.get_slice(key).get_shape())
        if actual_shape != tuple(shape):
            raise ToolError(
                f"{self._path}: tensor {key} has shape {list(actual_shape)}, expected {list(shape)}",
                "the checkpoint does not fit its model_config.json",
            )

    def refuse_leftovers(self, prefix: str, used: Iterable[str]) -> None:
        """Raise ToolError naming the first tensor under `prefix` that is not used."""
        for key in sorted(self.keys.difference(used)):
            if key.startswith(prefix) and not key.endswith(DERIVED_SUFFIXES):
                raise ToolError(
                    f"{self._path}: unexpected tensor {key}", "the checkpoint does not fit its model_config.json"
                )


def _is_pickle(path: Path) -> bool:
    """Return True for PyTorch's pickled format; loading it can execute code, so it is not supported."""
    with path.open("rb") as file:
        return file.read(4).startswith(_PICKLE_STARTS)


def _pickled(path: Path) -> ToolError:
    return ToolError(
        f"{path} is a pickled PyTorch checkpoint, not safetensors",
        "convert it: python -c \"import torch, safetensors.torch as s; m = torch.load('IN', 'cpu', weights_only=True); "
        f"s.save_file({{k: v.contiguous() for k, v in m.get('state_dict', m).items()}}, '{WEIGHTS_FILE}')\"",
    )
