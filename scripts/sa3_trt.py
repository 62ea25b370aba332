"""Stable Audio 3 from the command line: text to audio, audio to audio, in-painting. The command `sa3_trt`."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core import audio, console, engines, files, prompts, report, shapes, targets
from sa3_trt_core.errors import Parser, ToolError, integer_type, number_type, run_command
from sa3_trt_core.loading import Plan, make_plan
from sa3_trt_core.request import (
    FULL_APG,
    LEAST_NOISE,
    MOST_CFG,
    MOST_SEED,
    MOST_STEPS,
    Request,
    batches,
    count_stages,
)

if TYPE_CHECKING:
    from sa3_trt_core.pipeline import Result


@dataclass(frozen=True)
class Job:
    """All that is decided before a file is opened: the engines, the sounds in order, and where each goes."""

    plan: Plan
    requests: list[Request]
    outs: list[Path]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(prog="sa3_trt", description="Stable Audio 3: 44.1 kHz stereo from text, from sound, or from both.")
    parse.add_argument("--prompt", action="append", metavar="P", help="what to generate (may be repeated, or empty)")
    parse.add_argument("--prompts-file", type=Path, metavar="F", help="one prompt a line, or a JSON object a line")
    _add_model(parse)
    _add_sampling(parse)
    _add_sound(parse)
    parse.add_argument("--quiet", action="store_true", help="no progress")
    parse.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parse.add_argument("--dry-run", action="store_true", help="print what would be used and stop")
    return parse


def _add_model(parse: argparse.ArgumentParser) -> None:
    group = parse.add_argument_group("model")
    group.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="the model (default: %(default)s)")
    group.add_argument(
        "--precision", choices=targets.PRECISIONS, default=targets.PRECISIONS[0], help="its DiT (default: %(default)s)"
    )
    group.add_argument(
        "--backend", choices=engines.BACKENDS, default="auto",
        help="auto takes a built TensorRT engine if this machine can run it, else ONNX Runtime (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--models-dir", type=Path, metavar="D", help="engines (default: $SA3_MODELS_DIR, else models)")
    group.add_argument("--onnx-root", type=Path, metavar="D", help="ONNX files (default: $SA3_ONNX_DIR, else the hub)")
    group.add_argument("--revision", metavar="R", help="the hub's commit or branch, instead of the pinned one")
    group.add_argument("--offline", action="store_true", help="take the hub's files from its cache only")


def _add_sampling(parse: argparse.ArgumentParser) -> None:
    group = parse.add_argument_group("sampling")
    seconds = number_type(shapes.MIN_SECONDS, math.floor(shapes.MAX_SECONDS * 100) / 100, "seconds")
    group.add_argument("--seconds", type=seconds, default=30.0, metavar="S", help="length (default: 30)")
    group.add_argument("--steps", type=integer_type(1, MOST_STEPS, "steps"), default=8, metavar="N", help="default: 8")
    group.add_argument(
        "--seed", type=integer_type(0, MOST_SEED), metavar="N", help="of the first row, one more for each that follows"
    )
    group.add_argument("--batch", type=integer_type(1, shapes.MAX_BATCH), default=1, metavar="B", help="rows a forward")
    group.add_argument(
        "--cfg", type=number_type(0, MOST_CFG), default=1.0, metavar="X", help="guidance (default: 1, none)"
    )
    group.add_argument(
        "--apg", type=number_type(0, FULL_APG), metavar="X", help="0 plain guidance, 1 projected (default)"
    )
    group.add_argument("--negative-prompt", metavar="P", help="what to lead away from; needs --cfg")
    group.add_argument(
        "--legacy-schedule", action="store_true", help="the published TensorRT runtime's noise and length"
    )


def _add_sound(parse: argparse.ArgumentParser) -> None:
    group = parse.add_argument_group("sound")
    group.add_argument("--init-audio", type=Path, metavar="F", help="a sound to start from, of any format and rate")
    group.add_argument("--init-start", type=number_type(0, 1e6, "seconds"), default=0.0, metavar="S", help="read from")
    group.add_argument(
        "--init-noise-level", type=number_type(LEAST_NOISE, 1.0), metavar="X", help="how free of it: 0.01 to 1"
    )
    group.add_argument(
        "--inpaint-range", type=_range, action="append", default=[], metavar="A,B",
        help="seconds of --init-audio to make anew (may be repeated)",
    )  # fmt: skip
    group.add_argument("--paste-kept", action="store_true", help="put the kept latent back after every step")
    group.add_argument("--out", type=Path, metavar="F", help=".wav or .flac (default: output/<prompt>_<seed>.wav)")
    group.add_argument("--out-dir", type=Path, metavar="D", help="folder of <number>_<prompt>_<seed>.wav")
    group.add_argument(
        "--format", choices=[suffix[1:] for suffix in audio.FORMATS], help="without --out (default: wav)"
    )
    group.add_argument("--bits", choices=tuple(audio.BITS), default="16", help="a sample (default: %(default)s)")
    group.add_argument("--peak", choices=audio.PEAKS, default="clip", help="beyond full scale (default: %(default)s)")
    group.add_argument("--save-latents", type=Path, metavar="F.npz", help="also save latents, sigmas, seed, seconds")


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, generate, write, report. Raises ToolError."""
    args = parser().parse_args(argv)
    job = _job(args)
    if args.dry_run:
        report.show_plan(job.plan, job.requests, job.outs, args.json)
        return 0
    if args.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for path, start in dict.fromkeys((r.init_audio, r.init_start) for r in job.requests if r.init_audio is not None):
        audio.check_input(path, start)
    totals = _run(job, args)
    report.show_result(job.plan, job.requests, job.outs, totals, args.save_latents, args.json)
    return 0


def _job(args: argparse.Namespace) -> Job:
    """Decide everything that needs no file but the prompts file to be opened. Raises ToolError."""
    plan = make_plan(
        args.dit, args.precision, args.backend, args.onnx_root, args.models_dir, args.init_audio is not None,
        args.revision, args.offline,
    )  # fmt: skip
    rows = _rows(args)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    requests = [
        Request(
            row.prompt, args.seconds if row.seconds is None else row.seconds, args.steps,
            seed + index if row.seed is None else row.seed,
            args.negative_prompt if row.negative_prompt is None else row.negative_prompt,
            args.cfg, args.apg, args.init_audio, args.init_start, args.init_noise_level, tuple(args.inpaint_range),
            args.paste_kept, args.legacy_schedule,
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip
    list(batches(requests, args.batch))  # told now if they do not fit
    if args.out is not None and (args.out_dir is not None or args.format is not None):
        raise ToolError("--out names the file already", "leave --out-dir and --format away")
    several = next((flag for flag, value in (("--out", args.out), ("--save-latents", args.save_latents)) if value), "")
    if len(rows) > 1 and several:
        raise ToolError(f"{several} is one file and there are {len(rows)} prompts", "use --out-dir DIR")
    folder, suffix = args.out_dir or Path("output"), f".{args.format or 'wav'}"
    named = prompts.out_paths([(request.prompt, request.seed) for request in requests], folder, suffix)
    outs = [args.out] if args.out is not None else named
    for out in outs:
        audio.check_output(out, args.bits)
        files.require_writable(out, "--out")
    if args.save_latents is not None:
        if args.save_latents.suffix.lower() != ".npz":
            raise ToolError(f"--save-latents {args.save_latents} does not end in .npz", "it writes npz files only")
        files.require_writable(args.save_latents, "--save-latents")
    return Job(plan, requests, outs)


def _rows(args: argparse.Namespace) -> list[prompts.Row]:
    """The prompts of the command line or of the file; on a terminal, and nowhere else, one that is asked for."""
    if args.prompt is not None and args.prompts_file is not None:
        raise ToolError("--prompt and --prompts-file are both given", "choose one of the two")
    if args.prompts_file is not None:
        return prompts.read_prompts(args.prompts_file)
    if args.prompt is not None:
        return [prompts.Row(prompt) for prompt in args.prompt]
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ToolError("no prompt is given, and there is no terminal to ask on", "add --prompt TEXT")
    print("Prompt: ", end="", file=sys.stderr, flush=True)
    return [prompts.Row(sys.stdin.readline().strip())]


def _run(job: Job, args: argparse.Namespace) -> report.Totals:
    """Load, generate and write every sound as it is finished."""
    from sa3_trt_core.pipeline import Generator

    totals, started = report.Totals(), time.perf_counter()
    with console.Progress("load", len(job.plan.stages), "engines", quiet=args.quiet) as progress:
        importlib.import_module("torch")  # seconds of it, which would pass for text encoding otherwise
        generator = Generator.load(
            args.dit, args.precision, backend=args.backend, onnx_root=args.onnx_root, models_dir=args.models_dir,
            audio_input=args.init_audio is not None, revision=args.revision, offline=args.offline,
            on_engine=lambda note: progress.advance(note=note),
        )  # fmt: skip
    with generator:
        totals.add({"load": time.perf_counter() - started})
        if args.peak == "limit" and generator.clips:
            raise ToolError(
                "the decoder cuts its samples to full scale itself: --peak limit has nothing left to turn down",
                "choose --peak normalize or clip, or give a decoder with an `audio` output",
            )
        ids = {stage: generator.engines.identity(stage) for stage in job.plan.stages}
        stages = count_stages(job.requests, args.batch)
        with console.Progress("generate", stages, "stages", quiet=args.quiet) as progress:
            for index, result in generator.generate_many(
                job.requests, args.batch, lambda note: progress.advance(note=note)
            ):
                totals.add(result.timings, result.memory)
                totals.peaks[index] = float(result.audio.abs().max())
                started = time.perf_counter()
                about = report.metadata(job.requests[index], args.precision, ids)
                audio.write_audio(job.outs[index], audio.tame(result.audio, args.peak), args.bits, about)
                if args.save_latents is not None:
                    _write_latents(args.save_latents, job.requests[index], result)
                totals.add({"write": time.perf_counter() - started})
    return totals


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


def _range(text: str) -> tuple[float, float]:
    """ "1.5,4" as numbers."""
    try:
        start, end = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers A,B") from None
    return start, end


def entry() -> None:
    """The console script."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
