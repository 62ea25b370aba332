"""Ray actor of one GPU: one model, one ring, and a file for every assigned row."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from sa3_trt_core.cli import devices, report
from sa3_trt_core.cli.job import Job, plan_of
from sa3_trt_core.cli.run import open_generator, write_sound
from sa3_trt_core.errors import ToolError
from sa3_trt_core.live_ring import LiveRing

Failure = tuple[str, str]  # message and hint of a ToolError, whose class may not be picklable


class Worker:
    """One actor. `start` opens the model; `make` may be called by several threads at once, each for one row."""

    def __init__(self, job: Job, gpu: bool, depth: int, probe: tuple[Path, str], folder: Path) -> None:
        self._folder = folder  # base of relative paths in the flags
        self._job, self._gpu, self._depth, self._probe = job, gpu, depth, probe
        self._ring: LiveRing | None = None

    def start(self) -> tuple[str, dict[str, Any]] | Failure:
        """Open the model; return ("", totals) or the user's error."""
        if not self._gpu:
            devices.use_device(devices.CPU)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        totals = report.Totals()
        if self._folder.is_dir():
            os.chdir(self._folder)
        try:
            self._require_shared()
            self._job = self._job.planned(plan_of(self._job.flags))
            self._generator = open_generator(self._job, totals, lambda engine, index, total: None)
        except ToolError as error:
            return error.message, error.hint
        plan = self._job.plan
        self._ids = {stage: self._generator.engines.identity(stage) for stage in plan.stages}
        self._ring = LiveRing(self._generator, self._depth, max_waiting=1024)
        return "", {"timings": totals.timings}

    def make(self, index: int) -> tuple[str, dict[str, Any]] | Failure:
        """Generate and write one row; return ("", timings) or the error."""
        assert self._ring is not None
        totals = report.Totals()
        try:
            result = self._ring.submit(self._job.requests[index]).result()
            totals.add(result.timings, result.memory)
            write_sound(self._job, index, result, self._ids, totals)
        except ToolError as error:
            return error.message, error.hint
        peak = result.peak
        where = dict(self._generator.engines.devices)
        return "", {"timings": totals.timings, "memory": totals.memory, "peak": peak, "devices": where}

    def _require_shared(self) -> None:
        """Raise ToolError unless the output folder is the one of the driver, as on a shared file system."""
        path, token = self._probe
        try:
            same = path.read_text("utf-8") == token
        except OSError:
            same = False
        if not same:
            raise ToolError(
                f"{path.parent} on {socket.gethostname()} is not the folder of the machine that started the job",
                "give --out-dir a folder that all nodes share, at the same path",
            )
