"""What one run of the command makes: every sound, its settings and its file, decided before a file is opened."""

from __future__ import annotations

import argparse
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path

from sa3_trt_core.artifacts import files
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.cli import prompts
from sa3_trt_core.cli.lora_flags import lora_options, lora_specs
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import read_loras
from sa3_trt_core.model_loader import Plan, make_plan, plan_with
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.request import Request, batches, count_stages, ring_groups

RANDOM_SEED = -1  # of --seed, as the model's own command line has it


@dataclass(frozen=True)
class Job:
    """All that is decided before a file is opened: the engines, the sounds in order, and where each goes.

    `options` are the flags of the command.
    """

    plan: Plan
    requests: list[Request]
    outs: list[Path]
    options: argparse.Namespace

    @property
    def stages(self) -> int:
        """How often the generator tells of its progress."""
        return count_stages(self.requests, 1 if self.options.depth else self.options.batch or 1)


def make_job(args: argparse.Namespace) -> Job:
    """Decide everything that needs no file but the prompts file to be opened. Raises ToolError."""
    plan = make_plan(
        args.dit,
        args.precision,
        args.backend,
        ModelSource.of(args.onnx_root, args.models_dir, args.revision, args.offline),
        args.init_audio is not None,
        args.chunk_frames,
    )
    if args.lora:
        plan = plan_with(plan, read_loras(lora_specs(args), lora_options(args)), args.lora_bases)
    rows = [row for row in _rows(args) for _ in range(args.count)]
    seed = secrets.randbelow(2**32) if args.seed in (None, RANDOM_SEED) else args.seed
    requests = [
        Request(
            row.prompt, args.seconds if row.seconds is None else row.seconds, args.steps,
            seed + index if row.seed is None else row.seed + index % args.count,
            args.negative_prompt if row.negative_prompt is None else row.negative_prompt,
            args.cfg, args.apg, args.init_audio, args.init_start, args.init_noise_level, tuple(args.inpaint_range),
            args.paste_kept, args.legacy_schedule, args.duration_padding, args.schedule_order,
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip
    if args.batch is not None and args.depth is not None:
        raise ToolError("--batch and --depth are both given", "choose one: rows in step, or a ring of rows at any step")
    if args.depth is not None and args.free_models:
        raise ToolError("--depth and --free-models are both given", "choose one: a ring needs all models at once")
    # Told now if they do not fit.
    _ = ring_groups(requests, args.depth) if args.depth else list(batches(requests, args.batch or 1))
    if args.out is not None and (args.out_dir is not None or args.format is not None):
        raise ToolError("--out names the file already", "leave --out-dir and --format away")
    several = next((flag for flag, value in (("--out", args.out), ("--save-latents", args.save_latents)) if value), "")
    if len(rows) > 1 and several:
        raise ToolError(f"{several} is one file and there are {len(rows)} sounds", "use --out-dir DIR")
    folder, suffix = args.out_dir or Path("output"), f".{args.format or 'wav'}"
    named = prompts.out_paths([(request.prompt, request.seed) for request in requests], folder, suffix)
    outs = [args.out] if args.out is not None else [_beside(out, args.again) for out in named]
    for out in outs:
        audio_io.check_output(out, args.bits)
        files.require_writable(out, "--out")
    if args.save_latents is not None:
        if args.save_latents.suffix.lower() != ".npz":
            raise ToolError(f"--save-latents {args.save_latents} does not end in .npz", "it writes npz files only")
        files.require_writable(args.save_latents, "--save-latents")
    return Job(plan, requests, outs, args)


def _beside(out: Path, original: Path | None) -> Path:
    """Return `out`, with another name where it is the sound that is made again: that one is not overwritten."""
    same = original is not None and out.exists() and out.resolve() == original.resolve()
    return out.with_name(f"{out.stem}_again{out.suffix}") if same else out


def _rows(args: argparse.Namespace) -> list[prompts.Row]:
    """The prompts of the command line or of the file; on a terminal, and nowhere else, one that is asked for."""
    if args.prompt is not None and args.prompts_file is not None:
        raise ToolError("--prompt and --prompts-file are both given", "choose one of the two")
    if args.prompts_file is not None:
        return prompts.read_prompts(args.prompts_file)
    if args.prompt is not None:
        return [prompts.Row(prompt) for prompt in args.prompt]
    if sys.stdin is None or sys.stderr is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ToolError("no prompt is given, and there is no terminal to ask on", "add --prompt TEXT")
    print("Prompt: ", end="", file=sys.stderr, flush=True)
    return [prompts.Row(sys.stdin.readline().strip())]
