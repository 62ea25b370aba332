"""Read packed networks: one safetensors file each, with format and sizes in its header."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sa3_trt_core.errors import ToolError

REBUILD = "build it again"


def read_header(path: Path, wanted: str) -> dict[str, Any]:
    """Return the sizes in the header of a packed file with format `wanted`. Raises ToolError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != wanted:
            raise ValueError(f"format {metadata.get('format')}, not {wanted}")
        sizes = json.loads(metadata["sizes"])
        if not isinstance(sizes, dict):
            raise ValueError("its sizes are no JSON object")
        return sizes
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ToolError(f"{path} is not a packed network of this version ({error})", REBUILD) from None


def read_tensors(
    path: Path, device: torch.device, expected: Iterable[str], mapped: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a packed file, copied to `device`, except those named in `mapped`, which are not read.

    Raises ToolError if the file is incomplete or an `expected` tensor is missing.
    """
    from safetensors import SafetensorError, safe_open

    kept = frozenset(mapped)
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys() if key not in kept}  # noqa: SIM118 - no mapping
            missing = sorted(set(expected) - set(tensors) - set(file.keys()))
    except (SafetensorError, OSError) as error:
        raise ToolError(f"{path} is not a complete packed network ({error})", REBUILD) from None
    if missing:
        raise ToolError(f"{path}: tensor {missing[0]} is missing", REBUILD)
    return tensors


def header(name: str, sizes: dict[str, Any]) -> dict[str, str]:
    """Return the header of a packed file."""
    return {"format": name, "sizes": json.dumps(sizes, sort_keys=True)}
