"""Compare a DiT with a reference: single steps, generations, sound, batches; apply gates; write a report and a page."""

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
from sa3_trt_core.cli.arguments import Parser, add_folder_flags, integer_type, number_type, run_command
from sa3_trt_core.cli.lora_flags import add_lora_flags, lora_options, lora_specs
from sa3_trt_core.errors import GateError, ToolError

if TYPE_CHECKING:
    from sa3_trt_core.artifacts.calibration_set import CalibrationSet
    from sa3_validation.gates import Verdict
    from sa3_validation.models import ComparedModel, ModelPaths
    from sa3_validation.study import StudyResult
    from sa3_validation.two_sample_run import TwoSampleRun

DEFAULT_PROMPTS = 8
TOOLS = ("torch", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt_rtx")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="validate_fp8.py", description=__doc__)
    models = parser.add_argument_group("models")
    dit = f"a precision ({', '.join(targets.PRECISIONS)}), or the path of an ONNX file or engine"
    models.add_argument(
        "--reference", default="fp16mixed", metavar="DIT", help=f"reference DiT: {dit} (default: %(default)s)"
    )
    models.add_argument("--candidate", default="fp8", metavar="DIT", help="candidate DiT (default: %(default)s)")
    models.add_argument(
        "--backend", choices=engines.CHOICES, default="auto", help="backend of both DiTs (default: %(default)s)"
    )
    for role in ("reference", "candidate"):
        models.add_argument(
            f"--{role}-backend", choices=engines.CHOICES, help=f"backend of the {role} (default: that of --backend)"
        )
    models.add_argument(
        "--dit", choices=targets.DITS, default=targets.DITS[0],
        help="model that precisions refer to (default: %(default)s)",
    )  # fmt: skip
    add_folder_flags(models)
    add_lora_flags(parser)
    _add_runs(parser.add_argument_group("inputs"))
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out", type=Path, default=Path("output/validation"), metavar="DIR",
        help="folder of report.json, report.md and plots (default: %(default)s)",
    )  # fmt: skip
    out.add_argument(
        "--html", action="store_true", help="also write listen.html, a page to listen to, with a blind test"
    )
    out.add_argument("--gate", type=Path, metavar="F.toml", help="file of gates (default: sa3_validation/gates.toml)")
    out.add_argument("--bench", action="store_true", help="also time DiTs on this GPU (scripts/bench_dit.py)")
    out.add_argument("--json", action="store_true", help="print the report as JSON instead of tables")
    return parser


def _add_runs(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--calib", type=Path, metavar="X.npz", help="generate from a calibration set instead of prompts")
    group.add_argument(
        "--prompts-file", type=Path, metavar="F", help="file of prompts, one a line (default: the music examples)"
    )
    group.add_argument(
        "--prompts",
        type=integer_type(1, 1000),
        metavar="N",
        help=f"number of prompts or starts, 1 to 1000 (default {DEFAULT_PROMPTS}, all of a file)",
    )
    group.add_argument(
        "--seeds", type=integer_type(1, 100), default=1, metavar="K", help="seeds a prompt, 1 to 100 (default 1)"
    )
    group.add_argument("--seed", type=integer_type(0, 2**31 - 1), default=0, help="first seed (default 0)")
    seconds = number_type(shapes.MIN_SECONDS, int(shapes.MAX_SECONDS), "seconds")
    group.add_argument("--seconds", type=seconds, default=10.0, help="length of each sound in seconds (default 10)")
    group.add_argument("--steps", type=integer_type(1, 100), default=8, help="sampler steps, 1 to 100 (default 8)")
    group.add_argument(
        "--rows", type=integer_type(1, 10**6), default=64, metavar="N",
        help="rows of --calib to compare as single steps (default 64)",
    )  # fmt: skip
    group.add_argument(
        "--extra", type=integer_type(0, 100), default=2, metavar="N",
        help="number of texts that are also in-painted and guided, 0 to 100 (default 2)",
    )  # fmt: skip
    group.add_argument(
        "--two-sample",
        type=integer_type(2, 10_000),
        metavar="N",
        help="also run a classifier two-sample test on N sounds of each DiT, over all prompts (gates apply from 200)",
    )
    group.add_argument(
        "--published",
        type=Path,
        metavar="F.onnx",
        help="with --two-sample: FP8 graph of build_dit_fp8.py --recipe reference, a control that the test must detect",
    )
    group.add_argument(
        "--embedder", nargs=2, metavar=("onnx", "F"), help="with --two-sample: also compare embeddings of this network"
    )
    group.add_argument("--no-audio", action="store_true", help="compare latents only, without a decoder")


def main(argv: list[str] | None = None) -> int:
    """Run the comparison, write its report, and raise GateError when a gate fails."""
    args = make_parser().parse_args(argv)
    if args.calib is not None and args.prompts_file is not None:
        raise ToolError("--calib and --prompts-file exclude each other", "give one of them")
    if args.html and args.no_audio:
        raise ToolError("--html requires audio and --no-audio disables it", "leave one of them out")
    _require_two_sample(args)
    files.require_writable(args.out / "report.json", "--out")

    from sa3_trt_core.lora.lora_set import read_loras
    from sa3_trt_core.sampling import schedule
    from sa3_validation import gates, metrics
    from sa3_validation.models import ModelPaths, control_model, find_model
    from sa3_validation.study import Study

    limits = gates.read_gates(args.gate)
    loras = read_loras(lora_specs(args), lora_options(args))
    model_paths = ModelPaths(args.dit, paths.ModelSource.of(args.onnx_root, args.models_dir), loras)
    reference = find_model(args.reference, args.reference_backend or args.backend, model_paths)
    candidate = find_model(args.candidate, args.candidate_backend or args.backend, model_paths)
    study = Study(reference, candidate, control_model(reference, model_paths), args.steps, args.extra)
    two_sample = _two_sampled(args, model_paths, reference, candidate)
    result = _run(args, model_paths, study)
    context = {
        **_about(args), "reference": reference.described(), "candidate": candidate.described(),
        "control": study.control.described() if study.control else None,
        "speed": _speed(args.out / "bench", args.bench), "loras": loras.described(),
        "two_sample": two_sample.run() if two_sample is not None else None,
    }  # fmt: skip
    document = metrics.document(result, schedule.sigmas(args.steps).tolist(), context)
    verdicts = gates.judge(document, limits)
    document["gates"] = [vars(verdict) for verdict in verdicts]
    _write(args, document, verdicts, result)
    failed = [verdict.line for verdict in verdicts if not verdict.passed]
    if failed:
        hint = f"all figures: {args.out / 'report.md'}; their meaning: build/docs/validation.md"
        raise GateError(f"{candidate.name} {failed[0]}", hint, "\n".join(failed[1:]))
    return 0


def _require_two_sample(args: argparse.Namespace) -> None:
    """Raise ToolError when options of the two-sample test contradict each other or name missing files."""
    if args.two_sample is None:
        if args.published is not None or args.embedder is not None:
            raise ToolError("--published and --embedder require --two-sample", "give --two-sample N too")
        return
    if args.no_audio:
        raise ToolError("--two-sample requires audio and --no-audio disables it", "leave one of them out")
    if args.embedder is not None and args.embedder[0] != "onnx":
        raise ToolError(f"--embedder: unsupported kind {args.embedder[0]} (supported: onnx)", "give: --embedder onnx F")
    if args.published is not None and not args.published.is_file():
        raise ToolError(
            f"--published: file not found: {args.published}", "build it: build_dit_fp8.py --recipe reference"
        )
    missing = [name for name in ("librosa", "sklearn", "pyloudnorm") if importlib.util.find_spec(name) is None]
    if missing:
        raise ToolError(f"--two-sample needs {', '.join(missing)}", "pip install 'sa3-trt[validate]'")


def _two_sampled(
    args: argparse.Namespace, model_paths: ModelPaths, reference: ComparedModel, candidate: ComparedModel
) -> TwoSampleRun | None:
    """Return the two-sample test of the options with its files resolved; None without --two-sample."""
    if args.two_sample is None:
        return None
    import reprompt
    from sa3_validation import cases, two_sample_run
    from sa3_validation.embedding import Embedder
    from sa3_validation.models import find_model

    prompts = cases.prompts_of(None, args.prompts_file, reprompt.calibration_prompts())
    published = None if args.published is None else find_model(str(args.published), "onnxruntime", model_paths)
    return two_sample_run.TwoSampleRun(
        reference, candidate, published,
        model_paths, prompts, args.two_sample, args.seed, args.seconds, args.steps, args.out,
        text=_other(targets.find_target(targets.TEXT_ENCODER), args, model_paths),
        decoder=_other(targets.decoder_for(args.dit, "fp16mixed"), args, model_paths),
        embedder=None if args.embedder is None else Embedder(Path(args.embedder[1])),
    )  # fmt: skip


def _write(
    args: argparse.Namespace, document: dict[str, Any], verdicts: Sequence[Verdict], result: StudyResult
) -> None:
    """Write plots, report and page, and report.json last: its presence marks a complete run."""
    from sa3_validation import page, plots, report

    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    written = [*plots.draw(document, args.out), args.out / "report.md"]
    files.write_atomic_text(args.out / "report.md", report.markdown(document, verdicts))
    if args.html:
        written.append(page.write(args.out / "listen.html", document, result))
    files.write_atomic_text(args.out / "report.json", text)
    print(text if args.json else report.summary(document, verdicts))
    print("\n".join(str(path) for path in (*written, args.out / "report.json")), file=sys.stderr)


def _run(args: argparse.Namespace, model_paths: ModelPaths, study: Any) -> StudyResult:
    """Run generations and decode their sounds, with one engine open at a time."""
    import reprompt
    from sa3_trt_core.artifacts.calibration_set import CalibrationSet
    from sa3_trt_core.hub import resolve
    from sa3_trt_core.text import Tokenizer
    from sa3_validation import cases

    decoder = None if args.no_audio else _other(targets.decoder_for(args.dit, "fp16mixed"), args, model_paths)
    if args.calib is not None:
        calibration: CalibrationSet = CalibrationSet.open(args.calib)
        calibration.check_values()
        starts = cases.calibration_cases(calibration, cases.starts_of(calibration)[: args.prompts])
        result = study.run(starts, cases.calibration_rows(calibration, args.rows))
    else:
        default = None if args.prompts_file else DEFAULT_PROMPTS
        prompts = cases.prompts_of(args.prompts or default, args.prompts_file, reprompt.calibration_prompts())
        options = cases.TextCaseOptions(prompts, args.seeds, args.seed, args.seconds)
        target, backend, path = _other(targets.find_target(targets.TEXT_ENCODER), args, model_paths)
        tokenizer = Tokenizer(resolve.resolve_tokenizer(model_paths.source))
        with engines.open_engine(target, backend, model_paths.source, path) as encoder:
            texts = cases.text_cases(options, encoder, tokenizer)
        result = study.run(texts, [])
    if decoder is not None:
        target, backend, path = decoder
        with engines.open_engine(target, backend, model_paths.source, path) as engine:
            study.decode(engine, result)
    return result


def _other(
    target: targets.Target, args: argparse.Namespace, model_paths: ModelPaths
) -> tuple[targets.Target, str, Path]:
    """Return the target, backend and path of a text encoder or decoder; `--backend` applies when the target has it."""
    choice = engines.AUTO if args.backend in engines.BUILT else args.backend
    backend = engines.pick_backend(choice, target, model_paths.source.models_dir)
    return target, backend, engines.source_path(target, backend, model_paths.source)


def _about(args: argparse.Namespace) -> dict[str, Any]:
    """Return creation time, tool versions, threads and settings of a run, for the report."""
    import datetime

    import torch

    from sa3_trt_core.artifacts import manifest

    names = (
        "calib", "prompts_file", "two_sample", "published", "prompts", "seeds", "seed", "seconds", "steps", "rows",
        "extra", "no_audio",
    )  # fmt: skip
    settings = {name: str(v) if isinstance(v := getattr(args, name), Path) else v for name in names}
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tools": dict(manifest.tool_versions(TOOLS)),
        "threads": torch.get_num_threads(),
        "settings": settings,
    }


def _speed(out: Path, asked: bool) -> dict[str, Any]:
    """Return results of scripts/bench_dit.py on this GPU, or the reason for skipping it. Never raises."""
    import importlib.util

    from sa3_trt_core import gpu

    if not gpu.has_nvidia_gpu():
        return {"skipped": "no NVIDIA GPU is visible"}
    if not asked:
        return {"skipped": "no --bench"}
    if importlib.util.find_spec("bench_dit") is None:
        return {"skipped": "scripts/bench_dit.py is missing"}
    try:
        importlib.import_module("bench_dit").main(["--out", str(out)])
        return {"bench": json.loads((out / "bench.json").read_text("utf-8"))}
    except (ToolError, OSError, ValueError) as error:
        return {"skipped": f"bench_dit.py: {error}"}


if __name__ == "__main__":
    sys.exit(run_command(main))
