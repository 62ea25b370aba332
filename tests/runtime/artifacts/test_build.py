"""Building one artefact: kept when current, built under its lock, manifest written last."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sa3_trt_core.artifacts import locks, manifest
from sa3_trt_core.artifacts.build import build
from sa3_trt_core.errors import ToolError

INPUTS, SETTINGS = {"a": "0" * 64}, {"size": 1}


def make(path: Path, text: str, settings: dict[str, int] = SETTINGS, **options: object) -> str | None:
    """Return the reason for which `text` was written to `path`, or None if the existing file was kept."""
    with build(path, "note", INPUTS, settings, **options) as draft:
        if draft is None:
            return None
        draft.retire()
        path.write_text(text)
        draft.finish([path], {"checked": True})
        return draft.why


def test_an_artefact_is_made_once_and_again_for_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "note.txt"
    assert make(path, "one") == "missing"
    assert make(path, "two") is None and path.read_text() == "one"
    assert make(path, "two", {"size": 2}) == "setting size has changed"
    assert make(path, "three", {"size": 2}, force=True) == "--force: current" and path.read_text() == "three"
    assert make(path, "four", {"size": 9}, also=[{"size": 2}]) is None
    written = manifest.read_manifest(path)
    assert written is not None and (written.kind, written.gates) == ("note", {"checked": True})
    assert {file.name for file in path.parent.iterdir()} == {"note.txt", "note.txt.manifest.json"}


def test_the_second_of_two_makers_waits_and_keeps_what_the_first_made(tmp_path: Path) -> None:
    path, made = tmp_path / "note.txt", []
    with locks.exclusive_lock(locks.lock_path(path), "a build"):
        second = threading.Thread(target=lambda: made.append(make(path, "second")))
        second.start()
        second.join(0.3)
        assert second.is_alive() and not path.exists()
        path.write_text("first")
        manifest.write_manifest(path, "note", [path], INPUTS, SETTINGS)
    second.join(30)
    assert made == [None] and path.read_text() == "first"


def test_a_maker_that_fails_leaves_the_old_artefact_current_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    make(path, "one")
    with pytest.raises(ToolError), build(path, "note", INPUTS, {"size": 2}):
        raise ToolError("no", "never mind")
    assert make(path, "two") is None and len(list(tmp_path.iterdir())) == 2


def test_a_retired_artefact_is_made_again(tmp_path: Path) -> None:
    """The state after a kill between the first replaced file and the manifest."""
    path = tmp_path / "note.txt"
    make(path, "one")
    with pytest.raises(KeyboardInterrupt), build(path, "note", INPUTS, SETTINGS, force=True) as draft:
        assert draft is not None
        draft.retire()
        raise KeyboardInterrupt
    assert make(path, "two") == "note.txt.manifest.json is missing" and path.read_text() == "two"


def test_a_maker_without_a_manifest_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="without a manifest"), build(tmp_path / "x", "note", INPUTS, SETTINGS):
        pass
