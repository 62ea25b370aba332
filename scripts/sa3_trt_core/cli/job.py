"""Build the job of one run from the flags: sounds, settings and output files, before any model file is opened."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

from sa3_trt_core.artifacts import files
from sa3_trt_core.audio import io as audio_io
from sa3_trt_core.cli import prompts
from sa3_trt_core.cli.lora_flags import lora_options, lora_specs
from sa3_trt_core.errors import ToolError
from sa3_trt_core.lora.lora_set import read_loras
from sa3_trt_core.model_loader import Plan, make_plan, plan_with
from sa3_trt_core.paths import ModelSource
from sa3_trt_core.request import Request, batches, count_stages, ring_groups

RANDOM_SEED = -1  # --seed value for a random seed, as in the model's own command line


@dataclass(frozen=True)
class Options:
    """Flags that are used after the plan is made; see sa3_trt --help."""

    dit: str
    precision: str
    chunk_frames: int | None
    batch: int | None
    depth: int | None
    free_models: bool
    peak: str
    bits: str
    save_latents: Path | None
    quiet: bool
    shard: tuple[int, int] | None
    ray: str | None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """Return the flags as a mapping of names to values."""
        return cls(**{one.name: getattr(args, one.name) for one in fields(cls)})


@dataclass(frozen=True)
class Job:
    """Plan, requests in order and output files of one run.

    `numbers` are the row numbers in the whole list, from 1; `flags` are the command's flags, for workers.
    """

    plan: Plan
    requests: list[Request]
    outs: list[Path]
    options: Options
    numbers: list[int]
    flags: argparse.Namespace

    @property
    def stages(self) -> int:
        """Number of progress reports of the generator."""
        return count_stages(self.requests, 1 if self.options.depth else self.options.batch or 1)

    def planned(self, plan: Plan) -> Job:
        """Return the job with the plan of another machine."""
        return replace(self, plan=plan)

    def part(self, rows: list[int]) -> Job:
        """Return the job restricted to some rows."""
        requests, outs = [self.requests[row] for row in rows], [self.outs[row] for row in rows]
        return replace(self, requests=requests, outs=outs, numbers=[self.numbers[row] for row in rows])


def plan_of(args: argparse.Namespace) -> Plan:
    """Return the plan that the flags select on this machine. Raises ToolError."""
    source = ModelSource.of(args.onnx_root, args.models_dir, args.revision, args.offline)
    plan = make_plan(args.dit, args.precision, args.backend, source, args.init_audio is not None, args.chunk_frames)
    if args.refit and not args.lora:
        raise ToolError("--refit requires --lora", "name the adapters, or omit --refit")
    if not args.lora:
        return plan
    return plan_with(plan, read_loras(lora_specs(args), lora_options(args)), args.lora_bases, args.refit)


def make_job(args: argparse.Namespace) -> Job:
    """Build the job; the only file opened is the prompts file. Raises ToolError."""
    if args.devices is not None or args.ray is not None:
        _for_ray(args)
    plan, requests = plan_of(args), _requests(args)
    _check_conflicts(args, requests)
    outs = _outputs(args, requests)
    part = slice(None) if args.shard is None else slice(args.shard[0] - 1, None, args.shard[1])
    numbers = list(range(1, len(outs) + 1))[part]
    return Job(plan, requests[part], outs[part], Options.of(args), numbers, args)


def _requests(args: argparse.Namespace) -> list[Request]:
    """Return one request per row and repetition, with ascending seeds from --seed."""
    rows = [row for row in _rows(args) for _ in range(args.count)]
    seed = args.seed
    if seed in (None, RANDOM_SEED):  # resumed and distributed runs need reproducible names
        seed = 0 if args.shard is not None or args.ray is not None else secrets.randbelow(2**32)
    return [
        Request(
            row.prompt, args.seconds if row.seconds is None else row.seconds, args.steps,
            seed + index if row.seed is None else row.seed + index % args.count,
            args.negative_prompt if row.negative_prompt is None else row.negative_prompt,
            args.cfg, args.apg, args.init_audio, args.init_start, args.init_noise_level, tuple(args.inpaint_range),
            args.paste_kept, args.legacy_schedule, args.duration_padding, args.schedule_order,
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip


def _check_conflicts(args: argparse.Namespace, requests: Sequence[Request]) -> None:
    """Raise ToolError for conflicting flags and for batches that do not fit the engines."""
    if args.batch is not None and args.depth is not None:
        raise ToolError(
            "--batch and --depth cannot be combined", "choose one: rows in step, or a ring of rows at any step"
        )
    if args.depth is not None and args.free_models:
        raise ToolError("--depth and --free-models cannot be combined", "choose one: a ring needs all models at once")
    _ = ring_groups(requests, args.depth) if args.depth else list(batches(requests, args.batch or 1))
    if args.out is not None and (args.out_dir is not None or args.format is not None):
        raise ToolError("--out cannot be combined with --out-dir or --format", "omit them: --out names the file")
    several = next((flag for flag, value in (("--out", args.out), ("--save-latents", args.save_latents)) if value), "")
    if len(requests) > 1 and several:
        raise ToolError(f"{several} is one file and there are {len(requests)} sounds", "use --out-dir DIR")


def _outputs(args: argparse.Namespace, requests: Sequence[Request]) -> list[Path]:
    """Return the output file of each sound. Raises ToolError if one is not writable."""
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
    return outs


def _for_ray(args: argparse.Namespace) -> None:
    """Make the paths of the flags absolute: workers run in other folders. Raises ToolError."""
    flag = "--devices" if args.devices is not None else "--ray"
    if args.devices is not None and args.ray is not None:
        raise ToolError("--devices and --ray cannot be combined", "choose one: GPUs of this machine, or a Ray")
    for other, value in (("--batch", args.batch), ("--free-models", args.free_models), ("--device", args.device)):
        if value:
            raise ToolError(
                f"{flag} and {other} cannot be combined", f"omit {other}: every worker has a ring (--depth)"
            )
    for name in ("onnx_root", "models_dir", "init_audio", "out_dir", "out", "save_latents"):
        value = getattr(args, name)
        if value is not None:
            setattr(args, name, Path(value).resolve())
    if args.out is None and args.out_dir is None:
        args.out_dir = Path("output").resolve()
    source = ModelSource.of(args.onnx_root, args.models_dir, args.revision, args.offline)
    args.onnx_root = source.onnx_root and source.onnx_root.resolve()
    args.models_dir = source.models_dir.resolve()


def _beside(out: Path, original: Path | None) -> Path:
    """Return `out`, renamed if it is the --again sound itself, which must not be overwritten."""
    same = original is not None and out.exists() and out.resolve() == original.resolve()
    return out.with_name(f"{out.stem}_again{out.suffix}") if same else out


def _rows(args: argparse.Namespace) -> list[prompts.PromptRow]:
    """Return the prompts of the flags or of the file; without either, ask for one on a terminal."""
    if args.prompt is not None and args.prompts_file is not None:
        raise ToolError("--prompt and --prompts-file cannot be combined", "choose one of the two")
    if args.prompts_file is not None:
        return prompts.read_prompts(args.prompts_file)
    if args.prompt is not None:
        return [prompts.PromptRow(prompt) for prompt in args.prompt]
    if sys.stdin is None or sys.stderr is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ToolError("no prompt, and standard input is not a terminal", "add --prompt TEXT")
    print("Prompt: ", end="", file=sys.stderr, flush=True)
    return [prompts.PromptRow(sys.stdin.readline().strip())]
