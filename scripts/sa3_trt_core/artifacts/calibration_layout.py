"""Layout of a calibration .npz, and checks of its members before any data is read.

Rectangular, for text rows of one L: one member for each DiT input, first axis the calibration row, the rest as in the
contract without its batch axis: x (R, 256, L), t (R,), t5_hidden (R, 256, 768), t5_mask (R, 256), seconds_total (R,),
local_add_cond (R, 257, L), all fp32.

Ragged, for rows of several L or several kinds: the same six, but x and local_add_cond are flat (1-D fp32), the (256, L)
or (257, L) of each row concatenated; and two more, latent_frames (R,) int32, the L of each row, and kind (R,) uint8, an
index into calibration_kinds.KINDS. Neither contains pickles.
"""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sa3_trt_core import shapes
from sa3_trt_core.artifacts.calibration_kinds import KINDS
from sa3_trt_core.errors import ToolError

KEYS = tuple(spec.name for spec in shapes.CONTRACTS["dit"].inputs)
FLAT = ("x", "local_add_cond")
FRAMES, KIND = "latent_frames", "kind"
MAX_ROWS = 1 << 20
# Exceptions of zipfile, zlib and NumPy's header parser for damaged or hostile archives (RuntimeError: encrypted).
UNREADABLE = (
    OSError, EOFError, ValueError, SyntaxError, TypeError, RuntimeError, NotImplementedError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Latent frames L and kind of every row of a checked archive."""

    ragged: bool
    frames: tuple[int, ...]
    kinds: tuple[str, ...]


def row_shape(key: str, frames: int) -> tuple[int, ...]:
    """Return the shape of one row of `key`: that of the contract without batch axis."""
    spec = next(spec for spec in shapes.CONTRACTS["dit"].inputs if spec.name == key)
    return tuple(frames if dim == "L" else int(dim) for dim in spec.dims[1:])


def is_ragged(frames: Sequence[int], kinds: Sequence[str]) -> bool:
    """Return True if rows need the ragged layout: several L, or kinds other than text."""
    return len(set(frames)) > 1 or any(kind != KINDS[0] for kind in kinds)


def member_shape(key: str, frames: Sequence[int], ragged: bool) -> tuple[int, ...]:
    """Return the shape of a member for rows of these L."""
    if ragged and key in FLAT:
        return (row_shape(key, 1)[0] * sum(frames),)
    return (len(frames), *row_shape(key, frames[0]))


def read_layout(path: Path) -> Layout:
    """Check size, dtype and shape of every member, reading only the rows' L and kind. Raises ToolError."""
    try:
        with zipfile.ZipFile(path) as archive:
            ragged = f"{FRAMES}.npy" in archive.namelist()
            member_shapes = {key: _checked_shape(archive, key, path, np.dtype(np.float32)) for key in KEYS}
            rows = member_shapes["t"][0] if member_shapes["t"] else 0
            if not 1 <= rows <= MAX_ROWS:
                raise bad(path, f"has {rows} rows")
            if ragged:
                frames = _column(archive, FRAMES, path, rows, np.dtype(np.int32))
                kinds = _column(archive, KIND, path, rows, np.dtype(np.uint8))
            else:
                if len(member_shapes["x"]) != 3:
                    raise bad(path, f"member x has shape {list(member_shapes['x'])}, expected [{rows}, 256, L]")
                frames, kinds = [member_shapes["x"][2]] * rows, [0] * rows
    except UNREADABLE as error:
        raise bad(path, f"is not an npz archive ({error})") from None
    for row, (length, kind) in enumerate(zip(frames, kinds, strict=True)):
        if not 1 <= length <= shapes.MAX_FRAMES:
            raise bad(path, f"has {rows} rows, and row {row} is of {length} latent frames")
        if kind >= len(KINDS):
            raise bad(path, f"row {row} is of kind {kind}; there are {len(KINDS)}: {', '.join(KINDS)}")
    for key, shape in member_shapes.items():
        wanted = member_shape(key, frames, ragged)
        if shape != wanted:
            raise bad(path, f"member {key} has shape {list(shape)}, expected {list(wanted)}")
    return Layout(ragged, tuple(frames), tuple(KINDS[kind] for kind in kinds))


def skip_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the .npy header of a member; return shape, Fortran order and dtype."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def bad(path: Path, why: str) -> ToolError:
    """Return the ToolError of an invalid calibration file."""
    return ToolError(f"{path} {why}", "make a calibration set with build/make_calib.py")


def _column(archive: zipfile.ZipFile, key: str, path: Path, rows: int, dtype: np.dtype[Any]) -> list[int]:
    """Return a member with one number per row."""
    shape = _checked_shape(archive, key, path, dtype)
    if shape != (rows,):
        raise bad(path, f"member {key} has shape {list(shape)}, expected [{rows}]")
    with archive.open(f"{key}.npy") as stream:
        skip_header(stream)
        data = stream.read(rows * dtype.itemsize)
    if len(data) != rows * dtype.itemsize:
        raise bad(path, f"ends inside member {key}")
    return [int(value) for value in np.frombuffer(data, dtype)]


def _checked_shape(archive: zipfile.ZipFile, key: str, path: Path, wanted: np.dtype[Any]) -> tuple[int, ...]:
    try:
        member = archive.getinfo(f"{key}.npy")
    except KeyError:
        raise bad(path, f"has no member {key}") from None
    with archive.open(member) as stream:
        try:
            shape, fortran, dtype = skip_header(stream)
        except UNREADABLE as error:
            raise bad(path, f"member {key} is not an array ({error})") from None
        header = stream.tell()
    if dtype.hasobject:
        raise bad(path, f"member {key} holds pickled objects")
    if dtype != wanted or fortran:
        raise bad(path, f"member {key} is {dtype}{' in Fortran order' if fortran else ''}, expected {wanted}")
    if member.file_size != header + wanted.itemsize * int(np.prod(shape, dtype=object)):
        raise bad(path, f"member {key} differs in length from its header")
    return shape
