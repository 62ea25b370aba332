"""Compare a DiT with a reference: single steps, whole generations, their sound, batches; gates, a report and a page."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sa3_trt_core import engines, paths, shapes, targets
from sa3_trt_core.artifacts import files
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.cli.lora_flags import add_lora_flags, lora_options, lora_specs
from sa3_trt_core.errors import GateError, ToolError

if TYPE_CHECKING:
    from sa3_trt_core.artifacts.calibration_set import CalibrationSet
    from sa3_validation.gates import Verdict
    from sa3_validation.models import Place, Side
    from sa3_validation.study import Found
    from sa3_validation.two_sample_run import TwoSampleRun

DEFAULT_PROMPTS = 8
TOOLS = ("torch", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = Parser(prog="validate_fp8.py", description=__doc__)
    sides = line.add_argument_group("what is compared")
    dit = f"{', '.join(targets.PRECISIONS)}, or the path of an ONNX file or engine"
    sides.add_argument("--reference", default="fp16mixed", metavar="DIT", help=f"{dit} (default: %(default)s)")
    sides.add_argument("--candidate", default="fp8", metavar="DIT", help="the same (default: %(default)s)")
    sides.add_argument("--backend", choices=engines.CHOICES, default="auto", help="of both (default: %(default)s)")
    for side in ("reference", "candidate"):
        sides.add_argument(f"--{side}-backend", choices=engines.CHOICES, help=f"of the {side} alone")
    sides.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="the model (default: %(default)s)")
    sides.add_argument("--onnx-root", type=Path, metavar="D", help="ONNX files (default: $SA3_ONNX_DIR, else the hub)")
    sides.add_argument("--models-dir", type=Path, metavar="D", help="engines (default: $SA3_MODELS_DIR, else models)")
    add_lora_flags(line)
    _add_runs(line.add_argument_group("on what"))
    out = line.add_argument_group("what is written")
    out.add_argument(
        "--out", type=Path, default=Path("output/validation"), metavar="DIR",
        help="report.json, report.md and plots (default: %(default)s)",
    )  # fmt: skip
    out.add_argument(
        "--html", action="store_true", help="also listen.html there: a page to listen to, blind if you like"
    )
    out.add_argument(
        "--gate", type=Path, metavar="F.toml", help="gates (default: those shipped, validation/gates.toml)"
    )
    out.add_argument("--bench", action="store_true", help="also time DiTs on this GPU (scripts/bench_dit.py)")
    out.add_argument("--json", action="store_true", help="the report on stdout as JSON instead of tables")
    return line


def _add_runs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--calib", type=Path, metavar="X.npz", help="starts and rows of a calibration set, not prompts")
    group.add_argument("--prompts-file", type=Path, metavar="F", help="one prompt a line (default: Music examples)")
    group.add_argument(
        "--prompts", type=integer_type(1, 1000), metavar="N", help=f"the first N (default {DEFAULT_PROMPTS})"
    )
    group.add_argument("--seeds", type=integer_type(1, 100), default=1, metavar="K", help="a prompt (default 1)")
    group.add_argument("--seed", type=integer_type(0, 2**31 - 1), default=0, help="of the first one (default 0)")
    seconds = number_type(shapes.MIN_SECONDS, int(shapes.MAX_SECONDS), "seconds")
    group.add_argument("--seconds", type=seconds, default=10.0, help="of sound (default 10)")
    group.add_argument("--steps", type=integer_type(1, 100), default=8, help="of a generation (default 8)")
    group.add_argument(
        "--rows", type=integer_type(1, 10**6), default=64, metavar="N", help="of --calib, spread over it (default 64)"
    )
    group.add_argument(
        "--extra", type=integer_type(0, 100), default=2, metavar="N",
        help="texts that are also in-painted and guided, on lines of their own (default 2)",
    )  # fmt: skip
    group.add_argument(
        "--two-sample",
        type=integer_type(2, 10_000),
        metavar="N",
        help="also ask classifiers whether N sounds of each DiT can be told apart, over all prompts (200: judged)",
    )
    group.add_argument(
        "--published",
        type=Path,
        metavar="F.onnx",
        help="with --two-sample: an FP8 graph of build_dit_fp8.py --recipe reference, as a control that must be caught",
    )
    group.add_argument(
        "--embedder", nargs=2, metavar=("onnx", "F"), help="with --two-sample: also compare what this network gives"
    )
    group.add_argument("--no-audio", action="store_true", help="compare latents only; needs no decoder")


def main(argv: list[str] | None = None) -> int:
    """Check everything, run, write, judge."""
    args = parser().parse_args(argv)
    if args.calib is not None and args.prompts_file is not None:
        raise ToolError("--calib and --prompts-file are two sources of generations", "give one of them")
    if args.html and args.no_audio:
        raise ToolError("--html has nothing to play with --no-audio", "leave one of them out")
    _require_two_sample(args)
    files.require_writable(args.out / "report.json", "--out")

    from sa3_trt_core.lora.lora_set import read_loras
    from sa3_trt_core.sampling import schedule
    from sa3_validation import gates, metrics
    from sa3_validation.models import Place, control_side, find_side
    from sa3_validation.study import Study

    limits = gates.read_gates(args.gate)
    loras = read_loras(lora_specs(args), lora_options(args))
    place = Place(args.dit, paths.ModelSource.of(args.onnx_root, args.models_dir), loras)
    reference = find_side(args.reference, args.reference_backend or args.backend, place)
    candidate = find_side(args.candidate, args.candidate_backend or args.backend, place)
    study = Study(reference, candidate, control_side(reference, place), args.steps, args.extra)
    two_sample = _two_sampled(args, place, reference, candidate)
    found = _run(args, place, study)
    about = {
        **_about(args), "reference": reference.described(), "candidate": candidate.described(),
        "control": study.control.described() if study.control else None,
        "speed": _speed(args.out / "bench", args.bench), "loras": loras.described(),
        "two_sample": two_sample.run() if two_sample is not None else None,
    }  # fmt: skip
    document = metrics.document(found, schedule.sigmas(args.steps).tolist(), about)
    verdicts = gates.judge(document, limits)
    document["gates"] = [vars(verdict) for verdict in verdicts]
    _write(args, document, verdicts, found)
    failed = [verdict.line for verdict in verdicts if not verdict.passed]
    if failed:
        hint = f"all figures: {args.out / 'report.md'}; what they mean: build/docs/validation.md"
        raise GateError(f"{candidate.name} {failed[0]}", hint, "\n".join(failed[1:]))
    return 0


def _require_two_sample(args: argparse.Namespace) -> None:
    """Refuse options of the two-sample test that are at odds or name nothing. Raises ToolError."""
    if args.two_sample is None:
        if args.published is not None or args.embedder is not None:
            raise ToolError("--published and --embedder belong to --two-sample", "give --two-sample N too")
        return
    if args.no_audio:
        raise ToolError("--two-sample compares sounds, and --no-audio makes none", "leave one of them out")
    if args.embedder is not None and args.embedder[0] != "onnx":
        raise ToolError(f"--embedder: {args.embedder[0]} is no kind of network", "give: --embedder onnx F")
    if args.published is not None and not args.published.is_file():
        raise ToolError(f"--published: {args.published} is not there", "make it: build_dit_fp8.py --recipe reference")
    missing = [name for name in ("librosa", "sklearn", "pyloudnorm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ToolError(f"--two-sample needs {', '.join(missing)}", "pip install 'sa3-trt[validate]'")


def _two_sampled(args: argparse.Namespace, place: Place, reference: Side, candidate: Side) -> TwoSampleRun | None:
    """The two-sample test that is asked for, its files found; None where none is."""
    if args.two_sample is None:
        return None
    import reprompt
    from sa3_validation import cases, two_sample_run
    from sa3_validation.embedding import Embedder
    from sa3_validation.models import find_side

    prompts = cases.prompts_of(None, args.prompts_file, reprompt.calibration_prompts())
    return two_sample_run.TwoSampleRun(
        reference, candidate, None if args.published is None else find_side(str(args.published), "onnxruntime", place),
        place, prompts, args.two_sample, args.seed, args.seconds, args.steps, args.out,
        text=_other(targets.find_target(targets.TEXT_ENCODER), args, place),
        decoder=_other(targets.decoder_for(args.dit, "fp16mixed"), args, place),
        embedder=None if args.embedder is None else Embedder(Path(args.embedder[1])),
    )  # fmt: skip


def _write(args: argparse.Namespace, document: dict[str, Any], verdicts: Sequence[Verdict], found: Found) -> None:
    """Plots, report and page; report.json last, so that a whole one says that the others are."""
    from sa3_validation import page, plots, report

    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    written = [*plots.draw(document, args.out), args.out / "report.md"]
    files.write_atomic_text(args.out / "report.md", report.markdown(document, verdicts))
    if args.html:
        written.append(page.write(args.out / "listen.html", document, found))
    files.write_atomic_text(args.out / "report.json", text)
    print(text if args.json else report.summary(document, verdicts))
    print("\n".join(str(path) for path in (*written, args.out / "report.json")), file=sys.stderr)


def _run(args: argparse.Namespace, place: Place, study: Any) -> Found:
    """Texts or rows, generations and sounds, with one engine open at a time."""
    import reprompt
    from sa3_trt_core.artifacts.calibration_set import CalibrationSet
    from sa3_trt_core.hub import resolve
    from sa3_trt_core.text import Tokenizer
    from sa3_validation import cases

    decoder = None if args.no_audio else _other(targets.decoder_for(args.dit, "fp16mixed"), args, place)
    if args.calib is not None:
        calibration: CalibrationSet = CalibrationSet.open(args.calib)
        calibration.check_values()
        starts = cases.calibration_cases(calibration, cases.starts_of(calibration)[: args.prompts])
        found = study.run(starts, cases.calibration_rows(calibration, args.rows))
    else:
        default = None if args.prompts_file else DEFAULT_PROMPTS
        prompts = cases.prompts_of(args.prompts or default, args.prompts_file, reprompt.calibration_prompts())
        wanted = cases.Wanted(prompts, args.seeds, args.seed, args.seconds)
        target, backend, path = _other(targets.find_target(targets.TEXT_ENCODER), args, place)
        tokenizer = Tokenizer(resolve.resolve_tokenizer(place.source))
        with engines.open_engine(target, backend, place.source, path) as encoder:
            texts = cases.text_cases(wanted, encoder, tokenizer)
        found = study.run(texts, [])
    if decoder is not None:
        target, backend, path = decoder
        with engines.open_engine(target, backend, place.source, path) as engine:
            study.decode(engine, found)
    return found


def _other(target: targets.Target, args: argparse.Namespace, place: Place) -> tuple[targets.Target, str, Path]:
    """A text encoder or decoder: with the backend asked for where it has one, and where its file lies."""
    wanted = engines.AUTO if args.backend in engines.BUILT else args.backend
    backend = engines.pick_backend(wanted, target, place.source.models_dir)
    return target, backend, engines.source_path(target, backend, place.source)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on besides the DiTs."""
    import datetime

    import torch

    from sa3_trt_core.artifacts import manifest

    names = (
        "calib",
        "prompts_file",
        "two_sample",
        "published",
        "prompts",
        "seeds",
        "seed",
        "seconds",
        "steps",
        "rows",
        "extra",
        "no_audio",
    )
    settings = {name: str(v) if isinstance(v := getattr(args, name), Path) else v for name in names}
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tools": dict(manifest.tool_versions(TOOLS)),
        "threads": torch.get_num_threads(),
        "settings": settings,
    }


def _speed(out: Path, asked: bool) -> dict[str, Any]:
    """What scripts/bench_dit.py measures on this GPU, or why there is nothing; never in the way of the report."""
    import importlib.util

    from sa3_trt_core import gpu

    if not gpu.has_nvidia_gpu():
        return {"skipped": "no NVIDIA GPU is visible"}
    if not asked:
        return {"skipped": "--bench was not given"}
    if importlib.util.find_spec("bench_dit") is None:
        return {"skipped": "scripts/bench_dit.py is not there"}
    try:
        importlib.import_module("bench_dit").main(["--out", str(out)])
        return {"bench": json.loads((out / "bench.json").read_text("utf-8"))}
    except (ToolError, OSError, ValueError) as error:
        return {"skipped": f"bench_dit.py: {error}"}


if __name__ == "__main__":
    sys.exit(run_command(main))
