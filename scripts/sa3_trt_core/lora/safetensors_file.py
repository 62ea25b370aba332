"""Read and validate safetensors files; raise ToolError for pickles and other formats."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    import torch

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
          "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
INTEGERS = ("I64", "I32", "I16", "I8", "U8")
HINT = "give the .safetensors file that the trainer wrote, or download it again"
PICKLE_HINT = "pickles can run arbitrary code and are not opened: export a .safetensors file"


@dataclass(frozen=True)
class Entry:
    """Header entry of a tensor: the format's dtype name, shape, and byte range after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One file: `metadata` (str -> str) and `entries` by key. Tensors are memory-mapped."""

    def __init__(self, path: Path) -> None:
        """Read and validate the header. Raises ToolError for anything but a complete safetensors file."""
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(8)
                _refuse_foreign(path, start)
                length = int.from_bytes(start, "little")
                if len(start) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                    raise _broken(
                        path, f"its header claims {length} bytes of {size}" if len(start) == 8 else "too short"
                    )
                text = file.read(length)
        except IsADirectoryError:
            raise ToolError(f"{path} is a folder", "name the adapter file") from None
        except OSError as error:
            raise ToolError(f"cannot read {path}: {error.strerror or error}", HINT) from None
        self._data = 8 + length
        self.metadata, self.entries = _parsed(path, text, size - self._data)
        self._map: mmap.mmap | None = None

    def tensor(self, key: str) -> torch.Tensor:
        """Return a tensor of FLOATS or INTEGERS in its own dtype: a read-only view of the mapped bytes."""
        import torch

        entry = self.entries[key]
        floats = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
        integers = torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
        types = dict(zip((*FLOATS, *INTEGERS), (*floats, *integers), strict=True))
        if entry.end == entry.begin:
            return torch.zeros(entry.shape, dtype=types[entry.dtype])
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = (entry.end - entry.begin) // _BYTES[entry.dtype]
        if (self._data + entry.begin) % _BYTES[entry.dtype]:  # unaligned: allowed by the format, not by torch
            raw = bytearray(self._map[self._data + entry.begin : self._data + entry.end])
            return torch.frombuffer(raw, dtype=types[entry.dtype]).reshape(entry.shape)
        flat = torch.frombuffer(self._map, dtype=types[entry.dtype], count=count, offset=self._data + entry.begin)
        return flat.reshape(entry.shape)


def _parsed(path: Path, text: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, Entry]]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise _broken(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _broken(path, "its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, Mapping):
        raise _broken(path, "its metadata is not a JSON object")
    entries = {key: _entry(path, key, value, data_bytes) for key, value in header.items()}
    return {str(key): value for key, value in metadata.items() if isinstance(value, str)}, entries


def _entry(path: Path, key: str, value: Any, data_bytes: int) -> Entry:
    try:
        dtype, shape = value["dtype"], tuple(int(size) for size in value["shape"])
        begin, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _broken(path, f"the entry of {key} is malformed") from None
    count = 1
    for size in shape:
        count *= size
    if dtype not in _BYTES:
        raise _broken(path, f"{key} has the type {dtype!r}")
    if min((*shape, begin), default=0) < 0 or end > data_bytes or end - begin != count * _BYTES[dtype]:
        raise _broken(path, f"{key} is outside the file, which was truncated or changed")
    return Entry(dtype, shape, begin, end)


def _refuse_foreign(path: Path, start: bytes) -> None:
    """Raise ToolError for file types that are often mistaken for an adapter, naming the type."""
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise ToolError(f"{path} is a pickle (.ckpt, .pt, .bin)", PICKLE_HINT)
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        raise ToolError(f"{path} ends in {path.suffix}, as pickles do", PICKLE_HINT)
    if start.startswith(b"GGUF"):
        raise ToolError(f"{path} is a GGUF file", "give the .safetensors file that it was made of")
    if start.startswith(b"version "):
        raise ToolError(f"{path} is a Git LFS pointer, not the file itself", "fetch it: git lfs pull")


def _broken(path: Path, why: str) -> ToolError:
    return ToolError(f"{path} is not a whole safetensors file: {why}", HINT)
