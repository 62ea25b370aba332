"""Text to audio with Stable Audio 3: the command `sa3_trt`."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core import console, engines, files, hub, paths, shapes, targets
from sa3_trt_core.errors import Parser, ToolError, integer_type, number_type, run_command

if TYPE_CHECKING:
    from sa3_trt_core.pipeline import Request, Result

LONGEST_SLUG = 48
MOST_STEPS = 1000


@dataclass(frozen=True)
class Plan:
    """What is decided before a file is opened: targets in the order they run, their backends, where to write."""

    targets: dict[str, targets.Target]
    backends: dict[str, str]
    onnx_root: Path | None
    models_dir: Path
    out: Path
    latents: Path | None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = Parser(prog="sa3_trt", description="Text to audio with Stable Audio 3, as a 44.1 kHz stereo 16-bit WAV.")
    parse.add_argument("--prompt", required=True, metavar="P", help="what to generate; empty for unconditional")
    parse.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="the model (default: %(default)s)")
    parse.add_argument(
        "--precision", choices=targets.PRECISIONS, default=targets.PRECISIONS[0], help="its DiT (default: %(default)s)"
    )
    parse.add_argument(
        "--backend", choices=engines.BACKENDS, default="auto",
        help="auto takes a built TensorRT engine if this machine can run it, else ONNX Runtime (default: %(default)s)",
    )  # fmt: skip
    seconds = number_type(shapes.MIN_SECONDS, math.floor(shapes.MAX_SECONDS * 100) / 100, "seconds")
    parse.add_argument("--seconds", type=seconds, default=30.0, metavar="S", help="length (default: 30)")
    parse.add_argument("--steps", type=integer_type(1, MOST_STEPS, "steps"), default=8, metavar="N", help="default: 8")
    parse.add_argument("--seed", type=integer_type(0, 2**63 - 1), metavar="N", help="default: a new one every time")
    parse.add_argument("--out", type=Path, metavar="F", help="the WAV file (default: output/<prompt>_<seed>.wav)")
    parse.add_argument("--save-latents", type=Path, metavar="F.npz", help="also save latents, sigmas, seed, seconds")
    parse.add_argument("--models-dir", type=Path, metavar="D", help="engines (default: $SA3_MODELS_DIR, else models)")
    parse.add_argument("--onnx-root", type=Path, metavar="D", help="ONNX files (default: $SA3_ONNX_DIR, else the hub)")
    parse.add_argument("--quiet", action="store_true", help="no progress")
    parse.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parse.add_argument("--dry-run", action="store_true", help="print what would be used and stop")
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Text to audio: plan, generate, write, report. Raises ToolError."""
    args = parser().parse_args(argv)
    if args.seed is None:
        args.seed = secrets.randbelow(2**32)
    plan = _plan(args)
    if args.dry_run:
        return _show_plan(plan, args)
    if args.quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    request, result = _generate(plan, args)
    started = time.perf_counter()
    _write(plan, request, result)
    _show_result(plan, request, {**result.timings, "write": time.perf_counter() - started}, args.json)
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    """Decide everything that needs no file to be opened. Raises ToolError."""
    chosen = {
        "text": targets.find_target(targets.TEXT_ENCODER),
        "dit": targets.dit_target(args.dit, args.precision),
        "decoder": targets.decoder_for(args.dit, args.precision),
    }
    out = args.out or Path("output") / f"{_slug(args.prompt)}_{args.seed}.wav"
    _require_suffix(out, ".wav", "--out")
    files.require_writable(out, "--out")
    if args.save_latents is not None:
        _require_suffix(args.save_latents, ".npz", "--save-latents")
        files.require_writable(args.save_latents, "--save-latents")
    models_dir = args.models_dir or paths.default_models_dir()
    return Plan(
        targets=chosen,
        backends={stage: engines.pick_backend(args.backend, target, models_dir) for stage, target in chosen.items()},
        onnx_root=paths.onnx_root_from(args.onnx_root),
        models_dir=models_dir,
        out=out,
        latents=args.save_latents,
    )


def _generate(plan: Plan, args: argparse.Namespace) -> tuple[Request, Result]:
    """Resolve every file, then load, then sample: a missing file is told before minutes of loading."""
    from contextlib import ExitStack

    from sa3_trt_core.pipeline import Generator, Request
    from sa3_trt_core.text import Tokenizer

    started = time.perf_counter()
    sources: dict[str, Path] = {}

    def resolve(stage: str) -> None:
        target, backend = plan.targets[stage], plan.backends[stage]
        sources[stage] = engines.source_path(target, backend, plan.onnx_root, plan.models_dir)

    # An opt-in file may not be published: that is told first. The small tokenizer, behind a licence, before the rest.
    opt_in = [stage for stage, target in plan.targets.items() if target.opt_in]
    for stage in opt_in:
        resolve(stage)
    tokenizer_file = hub.resolve_tokenizer(plan.onnx_root)
    for stage in [stage for stage in plan.targets if stage not in opt_in]:
        resolve(stage)
    request = Request(args.prompt, args.seconds, args.steps, args.seed)
    with ExitStack() as stack:
        tokenizer = Tokenizer(tokenizer_file)
        with console.Progress("load", len(plan.targets), "engines", quiet=args.quiet) as progress:
            importlib.import_module("torch")  # seconds of it, which would pass for text encoding otherwise
            loaded = {}
            for stage, target in plan.targets.items():
                engine = engines.open_engine(
                    target, plan.backends[stage], plan.onnx_root, plan.models_dir, sources[stage]
                )
                loaded[stage] = stack.enter_context(engine)
                progress.advance(note=f"{target.name} ({plan.backends[stage]})")
        generator = Generator(tokenizer, loaded["text"], loaded["dit"], loaded["decoder"])
        load = time.perf_counter() - started
        with console.Progress("generate", request.stages, "stages", quiet=args.quiet) as progress:
            result = generator.generate(request, lambda note: progress.advance(note=note))
    result.timings.update({"load": load})
    return request, result


def _write(plan: Plan, request: Request, result: Result) -> None:
    from sa3_trt_core.audio import write_wav_16

    write_wav_16(plan.out, result.pcm)
    if plan.latents is not None:
        import numpy as np

        with files.atomic_path(plan.latents) as temporary:
            np.savez(
                temporary,
                latents=result.latents.numpy(),
                sigmas=result.sigmas.numpy(),
                seed=np.int64(request.seed),
                seconds=np.float64(request.seconds),
            )


def _show_plan(plan: Plan, args: argparse.Namespace) -> int:
    """Print what a run would use; opens, loads and downloads nothing."""
    stages = []
    for stage, target in plan.targets.items():
        local = hub.local_onnx(plan.onnx_root, target) if plan.onnx_root is not None else None
        root = str(plan.onnx_root or f"{targets.HUB_REPOSITORY}/{targets.HUB_FOLDER}")
        onnx = str(local or f"{root}/{target.onnx[0]}")
        source = onnx if plan.backends[stage] == "onnxruntime" else str(plan.models_dir / "<arch>" / target.engine)
        stages.append({"stage": stage, "target": target.name, "backend": plan.backends[stage], "file": source})
    frames = shapes.latent_frames(args.seconds, shapes.frame_cap(args.seconds))
    if args.json:
        document = {"stages": stages, "frames": frames, "steps": args.steps, "seed": args.seed, "out": str(plan.out)}
        print(json.dumps(document, indent=2))
        return 0
    print(console.table(["stage", "target", "backend", "file"], [list(stage.values()) for stage in stages]))
    print(f"{frames} latent frames, {args.steps} steps, seed {args.seed} -> {plan.out}")
    return 0


def _show_result(plan: Plan, request: Request, timings: dict[str, float], as_json: bool) -> None:
    order = [stage for stage in ("load", "text", "sample", "decode", "write") if stage in timings]
    samples = shapes.output_samples(request.seconds)
    if as_json:
        document: dict[str, Any] = {
            "out": str(plan.out),
            "latents": str(plan.latents) if plan.latents else None,
            "seconds": request.seconds,
            "samples": samples,
            "sample_rate": shapes.SAMPLE_RATE,
            "frames": request.frames,
            "steps": request.steps,
            "seed": request.seed,
            "engines": {stage: [target.name, plan.backends[stage]] for stage, target in plan.targets.items()},
            "timings": {stage: round(timings[stage], 6) for stage in order},
        }
        print(json.dumps(document, indent=2))
        return
    print(console.table(["stage", "seconds"], [[stage, f"{timings[stage]:.2f}"] for stage in order]))
    if plan.latents is not None:
        print(f"{plan.latents}  latents, {request.frames} frames")
    print(f"{plan.out}  {samples / shapes.SAMPLE_RATE:.2f} s, seed {request.seed}")


def _require_suffix(path: Path, suffix: str, flag: str) -> None:
    if path.suffix.lower() != suffix:
        raise ToolError(f"{flag} {path} does not end in {suffix}", f"{flag} writes {suffix[1:]} files only")


def _slug(prompt: str) -> str:
    """The prompt as a file name: ASCII letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:LONGEST_SLUG].strip("-") or "untitled"


def entry() -> None:
    """The console script."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    entry()
