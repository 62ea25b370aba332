"""The calibration set: the DiT's six inputs, one row a sampler step, in an .npz that streams both ways.

Layout: one member for each DiT input, first axis the calibration row, the rest as in the contract without its batch
axis: x (R, 256, L), t (R,), t5_hidden (R, 256, 768), t5_mask (R, 256), seconds_total (R,), local_add_cond
(R, 257, L), all fp32, no pickle. Memory does not grow with R on either side.
"""

from __future__ import annotations

import json
import shutil
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sa3_trt_core import files, shapes
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from torch import Tensor

KEYS = tuple(spec.name for spec in shapes.CONTRACTS["dit"].inputs)
MAX_ROWS = 1 << 20
CHUNK = 1 << 20
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the same rows give the same bytes
COMPRESSED = ("local_add_cond", "t5_mask")  # nearly all zeros; the rest is noise that no compressor shrinks
# What zipfile, zlib and NumPy's header parser raise on damaged or hostile archives (RuntimeError: encrypted).
UNREADABLE = (
    OSError, EOFError, ValueError, SyntaxError, TypeError, RuntimeError, NotImplementedError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip
Row = dict[str, np.ndarray]


def row_shape(key: str, frames: int) -> tuple[int, ...]:
    """The shape of one row of `key`: the contract's without its batch axis."""
    spec = next(spec for spec in shapes.CONTRACTS["dit"].inputs if spec.name == key)
    return tuple(frames if dim == "L" else int(dim) for dim in spec.dims[1:])


class CalibrationWriter:
    """Collect rows on disk and put them together as one .npz; a killed run goes on at its last finished group.

    Rows go to memory-mapped arrays in a hidden folder beside the target, with a note of how many are whole. `settings`
    is what the rows depend on: with other settings an unfinished folder is thrown away.
    """

    def __init__(self, target: Path, rows: int, frames: int, settings: Mapping[str, Any]) -> None:
        self._target = target
        self._folder = target.with_name(f".{target.name}.partial")
        self._note = self._folder / "progress.json"
        self._settings = json.loads(json.dumps({**settings, "rows": rows, "frames": frames}))
        self.rows = rows
        self.done = self._resumable()
        if not self.done:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        mode: Any = "r+" if self.done else "w+"
        self._arrays = {
            key: np.lib.format.open_memmap(
                self._folder / f"{key}.npy", mode=mode, dtype=np.float32, shape=(rows, *row_shape(key, frames))
            )
            for key in KEYS
        }
        self._next = self.done

    def append(self, row: Mapping[str, np.ndarray]) -> None:
        """Add one row; each value has a leading batch axis of 1, as the DiT got it."""
        for key, array in self._arrays.items():
            array[self._next] = row[key].reshape(array.shape[1:])
        self._next += 1

    def commit(self) -> None:
        """Everything appended so far is whole: a killed run starts after it."""
        for array in self._arrays.values():
            array.flush()
        self.done = self._next
        files.write_atomic_text(self._note, json.dumps({"settings": self._settings, "done": self.done}))

    def finish(self) -> None:
        """Write the .npz, whole or not at all, and remove the working folder."""
        assert self._next == self.rows, f"{self._next} of {self.rows} rows"
        self.commit()
        with files.atomic_path(self._target) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            for key in KEYS:
                member = zipfile.ZipInfo(f"{key}.npy", date_time=ZIP_DATE)
                member.compress_type = zipfile.ZIP_DEFLATED if key in COMPRESSED else zipfile.ZIP_STORED
                with (
                    (self._folder / f"{key}.npy").open("rb") as source,
                    archive.open(member, "w", force_zip64=True) as out,
                ):
                    shutil.copyfileobj(source, out, CHUNK)
        self._arrays.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _resumable(self) -> int:
        try:
            note = json.loads(self._note.read_text())
        except (OSError, ValueError):
            return 0
        whole = all((self._folder / f"{key}.npy").is_file() for key in KEYS)
        return int(note["done"]) if whole and note.get("settings") == self._settings else 0


@dataclass(frozen=True)
class CalibrationSet:
    """A checked calibration file. Rows are read one at a time and in order."""

    path: Path
    rows: int
    frames: int

    @classmethod
    def open(cls, path: Path) -> CalibrationSet:
        """Check the archive's members against the contract without reading their data.

        Raises ToolError when the file is absent or no npz, when a member is missing, is not fp32, has a wrong shape,
        holds objects (pickle), or is larger than its header says.
        """
        if not path.is_file():
            raise ToolError(f"no such calibration file: {path}", "make one with build/make_calib.py")
        try:
            with zipfile.ZipFile(path) as archive:
                shapes_found = {key: _member_shape(archive, key, path) for key in KEYS}
        except UNREADABLE as error:
            raise _bad(path, f"is not an npz archive ({error})") from None
        rows, frames = shapes_found["t"][0] if shapes_found["t"] else 0, 0
        if len(shapes_found["x"]) == 3:
            frames = shapes_found["x"][2]
        if not 1 <= rows <= MAX_ROWS or not 1 <= frames <= shapes.MAX_FRAMES:
            raise _bad(path, f"has {rows} rows of {frames} latent frames")
        for key, found in shapes_found.items():
            wanted = (rows, *row_shape(key, frames))
            if found != wanted:
                raise _bad(path, f"member {key} has shape {list(found)}, expected {list(wanted)}")
        return cls(path, rows, frames)

    def __iter__(self) -> Iterator[Row]:
        """Rows as dicts of fp32 arrays with a leading batch axis of 1."""
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            streams = {key: stack.enter_context(archive.open(f"{key}.npy")) for key in KEYS}
            for stream in streams.values():
                _read_header(stream)
            for index in range(self.rows):
                yield {key: self._read(stream, key, index) for key, stream in streams.items()}

    def check_values(self) -> dict[str, tuple[float, float]]:
        """Read every row once and return the range of each member.

        Raises ToolError naming row and member for NaN or infinity, a mask that is not 0/1, or sigma outside (0, 1].
        """
        ranges = {key: (np.inf, -np.inf) for key in KEYS}
        for index, row in enumerate(self):
            for key, array in row.items():
                low, high = float(array.min()), float(array.max())
                if not np.isfinite(low + high):
                    raise _bad(self.path, f"row {index} of {key} holds NaN or infinity")
                ranges[key] = (min(ranges[key][0], low), max(ranges[key][1], high))
            if not np.isin(row["t5_mask"], (0.0, 1.0)).all():
                raise _bad(self.path, f"row {index} of t5_mask is not 0 or 1")
            if not 0.0 < float(row["t"][0]) <= 1.0:
                raise _bad(self.path, f"row {index} has sigma {float(row['t'][0]):g}, outside (0, 1]")
        return ranges

    def sigmas(self) -> list[float]:
        """The sigma of every row, in order."""
        with zipfile.ZipFile(self.path) as archive, archive.open("t.npy") as stream:
            _read_header(stream)
            return [float(v) for v in np.frombuffer(stream.read(4 * self.rows), np.float32)]

    def _read(self, stream: IO[bytes], key: str, index: int) -> np.ndarray:
        shape = (1, *row_shape(key, self.frames))
        wanted = 4 * int(np.prod(shape))
        try:
            data = stream.read(wanted)
        except UNREADABLE as error:
            raise _bad(self.path, f"row {index} of {key} cannot be read ({error})") from None
        if len(data) != wanted:
            raise _bad(self.path, f"ends inside row {index} of {key}")
        return np.frombuffer(data, np.float32).reshape(shape)


@dataclass(frozen=True)
class ChosenRows:
    """Some rows of a calibration set, in its order."""

    whole: CalibrationSet
    indices: frozenset[int]

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.indices)

    def sigmas(self) -> list[float]:
        """The sigma of every one, in order."""
        return [sigma for index, sigma in enumerate(self.whole.sigmas()) if index in self.indices]

    def __iter__(self) -> Iterator[Row]:
        """The chosen rows, as the set gives them."""
        return (row for index, row in enumerate(self.whole) if index in self.indices)


def tensors(row: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """A row as an engine takes it."""
    import torch

    return {key: torch.from_numpy(np.array(value)) for key, value in row.items()}


def summary(calibration: CalibrationSet, ranges: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """What a person checks: rows, L, the list of sigmas, ranges."""
    return {
        "rows": calibration.rows,
        "latent_frames": calibration.frames,
        "sigmas": sorted({round(sigma, 6) for sigma in calibration.sigmas()}, reverse=True),
        "ranges": {key: [round(low, 4), round(high, 4)] for key, (low, high) in ranges.items()},
    }


def _member_shape(archive: zipfile.ZipFile, key: str, path: Path) -> tuple[int, ...]:
    try:
        member = archive.getinfo(f"{key}.npy")
    except KeyError:
        raise _bad(path, f"has no member {key}") from None
    with archive.open(member) as stream:
        try:
            shape, fortran, dtype = _read_header(stream)
        except UNREADABLE as error:
            raise _bad(path, f"member {key} is not an array ({error})") from None
        header = stream.tell()
    if dtype.hasobject:
        raise _bad(path, f"member {key} holds pickled objects")
    if dtype != np.float32 or fortran:
        raise _bad(path, f"member {key} is {dtype}{' in Fortran order' if fortran else ''}, expected float32")
    if member.file_size != header + 4 * int(np.prod(shape, dtype=object)):
        raise _bad(path, f"member {key} is not as long as its header says")
    return shape


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def _bad(path: Path, why: str) -> ToolError:
    return ToolError(f"{path} {why}", "make a calibration set with build/make_calib.py")
