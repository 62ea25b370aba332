"""Ordered stages in a working folder; a killed run resumes at its unfinished stage."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_build import memory
from sa3_trt_core.artifacts import files

NOTES_FILE = "stages.json"


@dataclass(frozen=True)
class Stage:
    """One step: the files that it reads and writes in the working folder, and its function."""

    name: str
    needs: tuple[Path, ...]
    leaves: tuple[Path, ...]
    run: Callable[[], Mapping[str, Any]]


class WorkingFolder:
    """On-disk checkpoint of a staged build.

    It is discarded when `note` (inputs, settings, tool versions, report format) differs from the one that it was made
    with.
    """

    def __init__(self, folder: Path, note: Mapping[str, Any]) -> None:
        self.folder, self.note = folder, note
        self.done: dict[str, Any] = {}

    def open(self) -> None:
        """Load the results of an interrupted run with the same note, or start an empty folder."""
        try:
            saved = json.loads((self.folder / NOTES_FILE).read_text())
        except (OSError, ValueError):
            saved = {}
        if saved.get("note") == self.note:
            self.done = saved["done"]
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)

    def run(self, stage: Stage) -> None:
        """Run a stage unless it is done; its results and seconds are stored once its files are complete."""
        if stage.name in self.done and all(path.exists() for path in stage.leaves):
            return
        for path in stage.needs:
            assert path.exists(), f"stage {stage.name} needs {path.name}"
        started = time.monotonic()
        result = dict(stage.run())
        memory.release_to_os()
        result["seconds"] = round(time.monotonic() - started, 2)
        self.done[stage.name] = result
        files.write_atomic_text(self.folder / NOTES_FILE, json.dumps({"note": self.note, "done": self.done}))

    def remove(self) -> None:
        """Remove the working folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
