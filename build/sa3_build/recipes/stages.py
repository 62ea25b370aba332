"""Ordered stages in a working folder: a killed run goes on at the stage it was in."""

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
    """One step: the files that it reads and leaves in the working folder, and the function that does it."""

    name: str
    needs: tuple[Path, ...]
    leaves: tuple[Path, ...]
    run: Callable[[], Mapping[str, Any]]


class WorkingFolder:
    """What finished stages left and found, for one `note` (inputs, settings, tools); another note throws it away."""

    def __init__(self, folder: Path, note: Mapping[str, Any]) -> None:
        self.folder, self.note = folder, note
        self.done: dict[str, Any] = {}

    def open(self) -> None:
        """Take over what an interrupted run with the same note left, or begin anew."""
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
        """Run a stage unless it is done; what it found and its seconds are noted once its files are whole."""
        if stage.name in self.done and all(path.exists() for path in stage.leaves):
            return
        for path in stage.needs:
            assert path.exists(), f"stage {stage.name} needs {path.name}"
        started = time.monotonic()
        found = dict(stage.run())
        memory.return_memory()
        found["seconds"] = round(time.monotonic() - started, 2)
        self.done[stage.name] = found
        files.write_atomic_text(self.folder / NOTES_FILE, json.dumps({"note": self.note, "done": self.done}))

    def remove(self) -> None:
        """Nothing is needed of it any more."""
        shutil.rmtree(self.folder, ignore_errors=True)
