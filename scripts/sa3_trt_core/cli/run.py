"""Generate the sounds of a job and write each file as it finishes."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core import console, gpu
from sa3_trt_core.artifacts import files
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.cli import again, report, resume
from sa3_trt_core.cli.job import Job
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_trt_core.pipeline import Generator, Progress
    from sa3_trt_core.request import Request
    from sa3_trt_core.result import Result


def produce(job: Job) -> report.Totals:
    """Load the engines, generate, and write every sound as it finishes. Raises ToolError."""
    args, totals = job.options, report.Totals()
    engines = 0 if args.free_models else len(job.plan.stages)
    with console.Progress("load", engines, "engines", quiet=args.quiet or not engines) as progress:
        generator = open_generator(job, totals, lambda engine, index, total: progress.advance(note=engine))
    with generator, console.Progress("generate", job.stages, "stages", quiet=args.quiet) as progress:
        write_sounds(generator, job, totals, lambda stage, index, total: progress.advance(note=stage))
    return totals


def produce_missing(job: Job) -> report.Totals:
    """Generate and write the sounds of a job whose files do not exist yet. Raises ToolError."""
    totals = report.Totals()
    resume.keep_finished(job, totals)
    rows = [index for index in range(len(job.requests)) if index not in totals.kept]
    if not rows:
        return totals
    made = produce(job.part(rows))
    made.peaks, made.kept = {rows[place]: peak for place, peak in made.peaks.items()}, totals.kept
    return made


def import_torch_early() -> None:
    """Start to import PyTorch in a thread: planning waits 0.2 s for the driver (H100), and does not need it."""

    def import_it() -> None:
        with contextlib.suppress(Exception):  # the import that needs the package reports it
            importlib.import_module("torch")

    threading.Thread(target=import_it, name="sa3-import", daemon=True).start()


def open_generator(job: Job, totals: report.Totals, on_progress: Progress) -> Generator:
    """Open the generator of a job. Raises ToolError, also for --peak limit with a decoder that clips."""
    started, args = time.perf_counter(), job.options
    gpu.open_context()
    importlib.import_module("torch")  # takes seconds, which would otherwise count as text encoding
    generator = _generator(job, on_progress)
    totals.add({"load": time.perf_counter() - started})
    for line in () if args.quiet else job.plan.loras.described():
        print(f"LoRA {line}", file=sys.stderr)
    try:
        if args.peak == "limit" and generator.clips:
            raise ToolError(
                "--peak limit has no effect: the decoder clips its samples to full scale itself",
                "choose --peak normalize or clip, or give a decoder with an output named audio",
            )
    except BaseException:
        generator.close()
        raise
    return generator


def write_sounds(generator: Generator, job: Job, totals: report.Totals, on_progress: Progress) -> None:
    """Generate and write the sounds of a job, adding time and memory to `totals`. Raises ToolError."""
    ids = {stage: generator.engines.identity(stage) for stage in job.plan.stages}
    started = time.perf_counter()
    for index, result in _results(generator, job, on_progress):
        totals.add(result.timings, result.memory)
        totals.peaks[index] = result.peak
        write_sound(job, index, result, ids, totals)
    totals.devices |= generator.engines.devices
    totals.elapsed += time.perf_counter() - started


def _generator(job: Job, on_progress: Progress) -> Generator:
    from sa3_trt_core.pipeline import Generator

    return Generator.open(job.plan, job.options.free_models, on_progress)


def _results(generator: Generator, job: Job, on_progress: Progress) -> Iterator[tuple[int, Result]]:
    if job.options.depth is not None:
        return generator.generate_ring(job.requests, job.options.depth, on_progress)
    return generator.generate_many(job.requests, job.options.batch or 1, on_progress)


def write_sound(job: Job, index: int, result: Result, ids: Mapping[str, str | None], totals: report.Totals) -> None:
    """Write one sound of a job, adding its time to `totals`. Raises ToolError."""
    args, request, started = job.options, job.requests[index], time.perf_counter()
    about = again.metadata(request, vars(job.flags), ids)
    audio_io.write_audio(job.outs[index], audio_io.tame(result.samples, args.peak), args.bits, about)
    if args.save_latents is not None:
        _write_latents(args.save_latents, request, result)
    totals.add({"write": time.perf_counter() - started})


def _write_latents(path: Path, request: Request, result: Result) -> None:
    import numpy as np

    with files.atomic_path(path) as temporary:
        np.savez(
            temporary,
            latents=result.latents.numpy(),
            sigmas=result.sigmas.numpy(),
            seed=np.int64(request.seed),
            seconds=np.float64(request.seconds),
        )
