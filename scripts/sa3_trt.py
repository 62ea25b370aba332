"""The command `sa3_trt`: generate sounds with Stable Audio 3 (text to audio, audio to audio, in-painting)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sa3_trt_core.audio import reader
from sa3_trt_core.cli import report
from sa3_trt_core.cli.again import again_line
from sa3_trt_core.cli.arguments import end_process, run_command
from sa3_trt_core.cli.devices import choose_devices
from sa3_trt_core.cli.job import Job, make_job
from sa3_trt_core.cli.parser import make_parser
from sa3_trt_core.cli.run import import_torch_early, produce, produce_missing


def main(argv: Sequence[str] | None = None) -> int:
    """Make the job, generate and write its sounds, print the results. Raises ToolError."""
    args = parse_flags(argv)
    several = choose_devices(args.device, args.devices)
    if not args.dry_run:
        import_torch_early()
    job = make_job(args)
    sounds = [(r.sound, r.init_start) for r in job.requests]
    for path, start in dict.fromkeys((path, start) for path, start in sounds if isinstance(path, Path)):
        reader.check_input(path, start)
    if args.dry_run:
        report.show_plan(job.plan, job.requests, job.outs, args.json)
        return 0
    if args.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    totals = _produce(job, several)
    report.show_result(job.plan, job.requests, job.outs, totals, args.save_latents, args.json)
    return 0


def _produce(job: Job, devices: Sequence[str]) -> report.Totals:
    if not devices and job.options.ray is None:
        return produce(job) if job.options.shard is None else produce_missing(job)
    from sa3_bulk.driver import produce_on_ray

    return produce_on_ray(job, devices)


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags; with --again on top of those of that sound. Raises ToolError."""
    flags = sys.argv[1:] if argv is None else list(argv)
    args = make_parser().parse_args(flags)
    return make_parser().parse_args([*again_line(args.again, args), *flags]) if args.again is not None else args


def entry() -> None:
    """Run as a console command."""
    end_process(run_command(main))


if __name__ == "__main__":
    entry()
