"""Calibration set: the DiT's six inputs, one row per sampler step, streamed from an .npz.

See calibration_layout for the file layout. Memory is constant except for a few bytes per row.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from sa3_trt_core.artifacts import calibration_layout
from sa3_trt_core.artifacts.calibration_layout import KEYS, KINDS, UNREADABLE, bad, row_shape, skip_header
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from torch import Tensor

Row = dict[str, np.ndarray]
T = TypeVar("T")


@dataclass(frozen=True)
class CalibrationSet:
    """Rows of a checked calibration file, all or those of indices `chosen`, read one at a time in file order."""

    path: Path
    layout: calibration_layout.Layout
    chosen: frozenset[int] | None = None

    @classmethod
    def open(cls, path: Path) -> CalibrationSet:
        """Check the archive's members against the contract without reading their data.

        Raises ToolError for a missing file, another format, a missing member, a wrong dtype or shape, pickled objects,
        or a member larger than its header states.
        """
        if not path.is_file():
            raise ToolError(f"no such calibration file: {path}", "make one with build/make_calib.py")
        return cls(path, calibration_layout.read_layout(path))

    def subset(self, indices: Iterable[int]) -> CalibrationSet:
        """Return the subset of rows with these indices in the file."""
        return replace(self, chosen=frozenset(indices))

    @property
    def indices(self) -> frozenset[int]:
        """Indices of the rows in the file."""
        return frozenset(range(len(self.layout.frames))) if self.chosen is None else self.chosen

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.indices)

    @property
    def frames(self) -> int:
        """Latent frames of the longest row, which determines the memory needed."""
        return max(self.lengths())

    def lengths(self) -> list[int]:
        """Latent frames of every row, in order."""
        return self._chosen_of(self.layout.frames)

    def kinds(self) -> list[str]:
        """Return the kind of every row, in order (calibration_kinds.KINDS)."""
        if self.layout.ragged:
            return self._chosen_of(self.layout.kinds)
        return self._chosen_of(_kinds_by_mask(self.path, self.path.stat().st_mtime_ns, self.layout))

    def __iter__(self) -> Iterator[Row]:
        """Yield rows as dicts of fp32 arrays with a leading batch axis of 1."""
        with ExitStack() as stack:
            archive = stack.enter_context(zipfile.ZipFile(self.path))
            streams = {key: stack.enter_context(archive.open(f"{key}.npy")) for key in KEYS}
            for stream in streams.values():
                skip_header(stream)
            chosen = self.indices
            for index in range(len(self.layout.frames)):
                row = {key: self._read(stream, key, index) for key, stream in streams.items()}
                if index in chosen:
                    yield row

    def check_values(self) -> dict[str, tuple[float, float]]:
        """Read every row once and return the range of each member.

        Raises ToolError naming row and member for NaN or infinity, a mask that is not 0/1, or sigma outside (0, 1].
        """
        ranges = {key: (np.inf, -np.inf) for key in KEYS}
        for index, row in zip(sorted(self.indices), self, strict=True):
            for key, array in row.items():
                low, high = float(array.min()), float(array.max())
                if not np.isfinite(low + high):
                    raise bad(self.path, f"row {index} of {key} holds NaN or infinity")
                ranges[key] = (min(ranges[key][0], low), max(ranges[key][1], high))
            if not np.isin(row["t5_mask"], (0.0, 1.0)).all():
                raise bad(self.path, f"row {index} of t5_mask is not 0 or 1")
            if not 0.0 < float(row["t"][0]) <= 1.0:
                raise bad(self.path, f"row {index} has sigma {float(row['t'][0]):g}, outside (0, 1]")
        return ranges

    def sigmas(self) -> list[float]:
        """Return the sigma of every row, in order."""
        with zipfile.ZipFile(self.path) as archive, archive.open("t.npy") as stream:
            skip_header(stream)
            return self._chosen_of(np.frombuffer(stream.read(4 * len(self.layout.frames)), np.float32).tolist())

    def _chosen_of(self, values: Sequence[T]) -> list[T]:
        return [values[index] for index in sorted(self.indices)]

    def _read(self, stream: IO[bytes], key: str, index: int) -> np.ndarray:
        shape = (1, *row_shape(key, self.layout.frames[index]))
        wanted = 4 * int(np.prod(shape))
        try:
            data = stream.read(wanted)
        except UNREADABLE as error:
            raise bad(self.path, f"row {index} of {key} cannot be read ({error})") from None
        if len(data) != wanted:
            raise bad(self.path, f"ends inside row {index} of {key}")
        return np.frombuffer(data, np.float32).reshape(shape)


@functools.lru_cache(maxsize=4)
def _kinds_by_mask(path: Path, _: int, layout: calibration_layout.Layout) -> tuple[str, ...]:
    """Return the kind of every row of a file without kinds: in-painting if local_add_cond is not zero, else text."""
    with zipfile.ZipFile(path) as archive, archive.open("local_add_cond.npy") as stream:
        skip_header(stream)
        sizes = [4 * int(np.prod(row_shape("local_add_cond", frames))) for frames in layout.frames]
        return tuple("inpaint" if np.frombuffer(stream.read(size), np.float32).any() else KINDS[0] for size in sizes)


def parity_selection(sigmas: Sequence[float], limit: int, kinds: Sequence[str] = ()) -> set[int]:
    """Return indices of rows that represent a set: at most `limit`, and at least one of every kind at every sigma.

    Every group has the same number of rows, spread over the set. `kinds` is the kind of each row (default: one kind).
    """
    groups: dict[tuple[str, float], list[int]] = {}
    for index, (kind, sigma) in enumerate(zip(kinds or [""] * len(sigmas), sigmas, strict=True)):
        groups.setdefault((kind, round(sigma, 6)), []).append(index)
    each = max(1, limit // len(groups))
    chosen: set[int] = set()
    for number, members in enumerate(groups.values()):
        step = max(1, len(members) // each)
        first = number % step  # offset, so that each sigma uses other prompts, masks and lengths
        chosen.update(members[first::step][:each])
    return chosen


def representative(calibration: CalibrationSet, limit: int) -> CalibrationSet:
    """Return at most `limit` representative rows of a set, and at least one of every kind at every sigma."""
    return calibration.subset(parity_selection(calibration.sigmas(), limit, calibration.kinds()))


def tensors(row: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return a row as torch tensors, the inputs of an engine."""
    import torch

    return {key: torch.from_numpy(np.array(value)) for key, value in row.items()}


def summary(calibration: CalibrationSet, ranges: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Return a summary: number of rows, every L, rows by kind and L, sigmas, value ranges."""
    kind_lengths = list(zip(calibration.kinds(), calibration.lengths(), strict=True))
    return {
        "rows": calibration.rows,
        "latent_frames": sorted(set(calibration.lengths())),
        "kinds": {
            kind: {
                str(length): kind_lengths.count((kind, length))
                for length in sorted({n for k, n in kind_lengths if k == kind})
            }
            for kind in KINDS
            if kind in calibration.kinds()
        },
        "sigmas": sorted({round(sigma, 6) for sigma in calibration.sigmas()}, reverse=True),
        "ranges": {key: [round(low, 4), round(high, 4)] for key, (low, high) in ranges.items()},
    }
