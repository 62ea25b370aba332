"""Damage a valid file in one chosen way, as a torn download, a wrong version or a hostile sender would."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Arrays = dict[str, np.ndarray]
Weights = dict[str, torch.Tensor]
ENCRYPTED = 1  # bit of a zip member's flags


def copy_checkpoint(source: Path, folder: Path) -> Path:
    """Copy a checkpoint to `folder`, to be changed by the test."""
    shutil.copytree(source, folder)
    return folder


def edit_weights(file: Path, edit: Callable[[Weights], object]) -> None:
    """Change the tensors of a safetensors file in place."""
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def edit_config(file: Path, path: str, value: Any = None, delete: bool = False) -> None:
    """Set or delete one value of a JSON file, by its dotted path; a list is indexed by number."""
    document = json.loads(file.read_text())
    place: Any = document
    *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
    for step in steps:
        place = place[step]
    if delete:
        del place[last]
    else:
        place[last] = value
    file.write_text(json.dumps(document))


def npy_bytes(array: np.ndarray, shape: tuple[int, ...] | None = None, version: tuple[int, int] = (1, 0)) -> bytes:
    """Return the bytes of an .npy member whose header states `shape`, whether or not the data has it."""
    out = io.BytesIO()
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape or array.shape}
    write = np.lib.format.write_array_header_1_0 if version == (1, 0) else np.lib.format.write_array_header_2_0
    write(out, header)  # type: ignore[arg-type]  # numpy's stubs want a TypedDict
    return out.getvalue() + array.tobytes()


def write_members(
    path: Path,
    members: Mapping[str, bytes],
    sizes: Mapping[str, int] | None = None,
    flags: Mapping[str, int] | None = None,
) -> None:
    """Write a zip archive of stored members; `sizes` and `flags` replace the true values in its directory."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
        for name, size in (sizes or {}).items():
            archive.getinfo(f"{name}.npy").file_size = size
        for name, bits in (flags or {}).items():
            archive.getinfo(f"{name}.npy").flag_bits |= bits


def write_false_row_count(path: Path, arrays: Arrays, rows: int) -> None:
    """Write an archive whose headers and directory state `rows` rows, but which holds only those of `arrays`."""
    members = {key: npy_bytes(value, (rows, *value.shape[1:])) for key, value in arrays.items()}
    sizes = {key: len(members[key]) - value.nbytes + value.nbytes // len(value) * rows for key, value in arrays.items()}
    write_members(path, members, sizes)


def write_corrupt_deflate(path: Path, arrays: Arrays, key: str) -> None:
    """Write a compressed archive in which one member's stream begins with a block type that deflate does not define."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, value in arrays.items():
            archive.writestr(f"{name}.npy", npy_bytes(value))
        member = archive.getinfo(f"{key}.npy")
        start = member.header_offset + 30 + len(member.filename)  # 30: a local header without its name
    data = bytearray(path.read_bytes())
    data[start] = 0b111
    path.write_bytes(bytes(data))


def write_gibberish_header(path: Path, arrays: Arrays, key: str) -> None:
    """Write an archive with one member whose .npy header is not a Python literal."""
    text = b"{'descr': '<f4', (((\n"
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    write_members(path, {name: header if name == key else npy_bytes(value) for name, value in arrays.items()})
