"""Selection of a job's sounds that exist already: files of the same name whose metadata state the same settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa3_trt_core.artifacts import files
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.cli import again, report
from sa3_trt_core.cli.job import Job
from sa3_trt_core.errors import ToolError

OF_THE_MACHINE = ("engines", "version")  # they do not say what was asked for


def keep_finished(job: Job, totals: report.Totals) -> None:
    """Note the rows of a job whose sounds are there, and remove what killed runs left beside them.

    A file is written in one piece, so one that is there is whole; it is made again if it says another setting.
    """
    for index, out in enumerate(job.outs):
        files.remove_leftovers(out)
        asked = again.metadata(job.requests[index], vars(job.flags), {})
        if out.is_file() and _says(out, asked):
            totals.kept.add(index)


def _says(path: Path, asked: Mapping[str, Any]) -> bool:
    """Return True if a sound was made with the settings of `asked`; a text that a WAV file cut counts by its head."""
    try:
        stored = audio_io.read_metadata(path)
    except ToolError:
        return False
    names = (stored.keys() | asked.keys()) - set(OF_THE_MACHINE)
    return all(_same(path, stored.get(name), asked.get(name)) for name in names)


def _same(path: Path, stored: object, asked: object) -> bool:
    if isinstance(stored, str) and isinstance(asked, str) and audio_io.was_cut(path, stored):
        return asked.startswith(stored.removesuffix(audio_io.ELLIPSIS))
    return stored == asked
