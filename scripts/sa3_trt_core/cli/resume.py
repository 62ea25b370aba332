"""Find the sounds of a job that exist already: files of the same name and with the same settings in their metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa3_trt_core.artifacts import files
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.cli import again, report
from sa3_trt_core.cli.job import Job
from sa3_trt_core.errors import ToolError

OF_THE_MACHINE = ("engines", "version")  # metadata keys that are not settings of the request


def keep_finished(job: Job, totals: report.Totals) -> None:
    """Record the rows whose sounds exist, and remove temporary files of killed runs.

    Writes are atomic, so an existing file is complete. A file with other settings is generated again.
    """
    for index, out in enumerate(job.outs):
        files.remove_leftovers(out)
        asked = again.metadata(job.requests[index], vars(job.flags), {})
        if out.is_file() and _says(out, asked):
            totals.kept.add(index)


def _says(path: Path, asked: Mapping[str, Any]) -> bool:
    """Return True if a sound's settings equal `asked`; a text truncated by WAV is compared by its prefix."""
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
