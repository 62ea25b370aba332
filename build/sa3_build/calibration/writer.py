"""Write a calibration set: rows are collected on disk, then written to one .npz atomically."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sa3_trt_core.artifacts import files
from sa3_trt_core.artifacts.calibration_layout import FLAT, FRAMES, KEYS, KIND, KINDS, is_ragged, member_shape

CHUNK = 1 << 20
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # fixed, so that equal rows give equal bytes
COMPRESSED = ("local_add_cond", "t5_mask", FRAMES, KIND)  # mostly repeated values; the others are noise


class CalibrationWriter:
    """Collects rows on disk and writes them to one .npz; a killed run resumes after its last committed group.

    `frames` is the L of every row, or one L for all; `kinds` is the kind of every row (default: text). Rows go to
    memory-mapped arrays in a hidden folder beside the target, with a record of how many are complete. The rows depend
    on `settings`: a folder with other settings is discarded. Text rows of one L are stored in the rectangular form, all
    others in the ragged one (calibration_layout).
    """

    def __init__(
        self, target: Path, rows: int, frames: int | Sequence[int], settings: Mapping[str, Any],
        kinds: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._frames = [frames] * rows if isinstance(frames, int) else list(frames)
        self._kinds = list(kinds) or [KINDS[0]] * rows
        assert len(self._frames) == len(self._kinds) == rows, "one L and one kind per row"
        self._ragged = is_ragged(self._frames, self._kinds)
        self._target = target
        self._folder = target.with_name(f".{target.name}.partial")
        self._note = self._folder / "progress.json"
        plan = {"rows": rows, "frames": self._frames, "kinds": self._kinds}
        self._settings = json.loads(json.dumps({**settings, **plan}))
        self.rows = rows
        self.done = self._resumable()
        if not self.done:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        mode: Any = "r+" if self.done else "w+"
        self._arrays = {
            key: np.lib.format.open_memmap(
                self._folder / f"{key}.npy", mode=mode, dtype=np.float32,
                shape=member_shape(key, self._frames, self._ragged),
            )
            for key in KEYS
        }  # fmt: skip
        for key in KEYS:
            # Allocate now: writing to a mapped page on a full disk raises SIGBUS instead of an error.
            with (self._folder / f"{key}.npy").open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        self._next = self.done

    def append(self, row: Mapping[str, np.ndarray]) -> None:
        """Add one row; each value has a leading batch axis of 1, as the DiT's inputs. Its L must be as planned."""
        assert row["x"].shape[-1] == self._frames[self._next], "the row's L differs from the plan"
        before = sum(self._frames[: self._next])
        for key, array in self._arrays.items():
            if self._ragged and key in FLAT:
                start = before * row[key].shape[1]
                array[start : start + row[key].size] = row[key].reshape(-1)
            else:
                array[self._next] = row[key].reshape(array.shape[1:])
        self._next += 1

    def commit(self) -> None:
        """Record that all rows appended so far are complete; a killed run resumes after them."""
        for array in self._arrays.values():
            array.flush()
        self.done = self._next
        files.write_atomic_text(self._note, json.dumps({"settings": self._settings, "done": self.done}))

    def finish(self) -> None:
        """Write the .npz atomically and remove the working folder."""
        assert self._next == self.rows, f"{self._next} of {self.rows} rows"
        self.commit()
        members: tuple[str, ...] = KEYS
        if self._ragged:
            np.save(self._folder / f"{FRAMES}.npy", np.array(self._frames, np.int32))
            np.save(self._folder / f"{KIND}.npy", np.array([KINDS.index(kind) for kind in self._kinds], np.uint8))
            members = (*KEYS, FRAMES, KIND)
        with files.atomic_path(self._target) as temporary, zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            for key in members:
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
        complete = all((self._folder / f"{key}.npy").is_file() for key in KEYS)
        return int(note["done"]) if complete and note.get("settings") == self._settings else 0
