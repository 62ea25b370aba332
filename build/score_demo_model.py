"""Score a demonstration checkpoint on held-out pieces: autoencoder, tempo and key of generations, in-painting."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sa3_trt_core.cli.arguments import Parser, integer_type, run_command
from sa3_trt_core.cli.lora_flags import add_lora_flags, lora_options, lora_specs
from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import MAX_BATCH

FORMS = ("deployed", "request")
TOOLS = ("torch", "numpy", "diffusers", "transformers", "tokenizers", "onnxruntime", "onnxruntime-gpu")

LABELS = {
    "generated": "generated",
    "chance": "generated, against the other captions",
    "data": "the data itself",
    "data_through_autoencoder": "the data through the autoencoder",
}


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="score_demo_model.py", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="folder of a native checkpoint")
    parser.add_argument(
        "--onnx-root", type=Path, metavar="ROOT", help="also compare its fp32 and FP16-mixed ONNX DiT in this folder"
    )
    parser.add_argument("--dit", type=Path, metavar="FILE", help="generate with this ONNX DiT, e.g. dit_fp8.onnx")
    parser.add_argument(
        "--prompts", type=integer_type(1, 1000), default=32, help="number of test captions (default: 32)"
    )
    parser.add_argument(
        "--seconds",
        type=integer_type(2, 30, "seconds"),
        default=10,
        help="length of a clip in seconds, 2..30 (default: 10)",
    )
    parser.add_argument(
        "--loops",
        type=integer_type(1, 1000),
        default=16,
        help="number of test loops for the autoencoder (default: 16)",
    )
    parser.add_argument("--steps", type=integer_type(1, 100), default=8, help="sampler steps, 1..100 (default: 8)")
    parser.add_argument(
        "--batch", type=integer_type(1, MAX_BATCH), default=8, help=f"clips per batch, 1..{MAX_BATCH} (default: 8)"
    )
    parser.add_argument(
        "--seed", type=integer_type(0, 2**31 - 1), default=0, help="seed of the first clip (default: 0)"
    )
    parser.add_argument("--form", choices=FORMS, default="deployed", help="form of the captions (default: deployed)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the first clips and their spectrograms to this folder"
    )
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="F.txt",
        help="write the test captions to this file, one per line, and exit",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    add_lora_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure everything and print it. The exit code does not depend on the scores."""
    args = make_parser().parse_args(argv)

    from sa3_demo import score
    from sa3_demo.checkpoint_under_test import CheckpointUnderTest
    from sa3_trt_core.artifacts import files
    from sa3_trt_core.lora.lora_set import read_loras

    if args.captions:
        files.require_writable(args.captions, "--captions")
        captions = score.held_out_captions(args.prompts, args.seconds, args.form)
        files.write_atomic_text(args.captions, "\n".join(captions) + "\n")
        print(f"{args.captions}: {len(captions)} captions")
        return 0
    if args.out:
        files.require_writable(args.out / "prompt_00_generated.wav", "--out")
    if args.dit and not args.dit.is_file():
        raise ToolError(f"--dit: no such file: {args.dit}", "give a DiT exported from the same checkpoint, or omit it")
    graphs = score.rollout_graphs(args.onnx_root) if args.onnx_root else None
    loras = read_loras(lora_specs(args), lora_options(args))
    timings: dict[str, float] = {}
    with timed(timings, "load"):
        subject = CheckpointUnderTest(args.checkpoint, args.seconds, args.steps, args.batch, args.dit, loras)
    document = about(args) | {"loras": loras.described()}
    with timed(timings, "autoencoder"):
        loops = score.held_out_loops(subject, max(args.prompts, args.loops), args.form)
        document["autoencoder"] = score.autoencoder_score(subject, loops[: args.loops])
    with timed(timings, "text_to_audio"):
        document |= score.text_to_audio_score(subject, loops[: args.prompts], args.seed, args.out)
    with timed(timings, "inpainting"):
        document["inpainting"] = score.inpainting_score(subject, loops[: score.INPAINTED], args.seed)
    with timed(timings, "rollouts"):
        first = loops[: min(score.ROLLED_OUT, args.prompts)]
        document["rollouts"] = score.rollout_score(subject, first, args.seed, graphs) if graphs else None
    document["seconds"] = timings
    if args.json:
        print(json.dumps(document, indent=2, allow_nan=False))
    else:
        print("\n\n".join(tables(document)))
    return 0


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Record the seconds that a block takes."""
    started = time.monotonic()
    yield
    timings[name] = round(time.monotonic() - started, 2)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Return the conditions of the figures: checkpoint, settings, tools, threads."""
    import torch

    from sa3_build.export.load_modules import CONFIG_FILE
    from sa3_build.export.native_weights import WEIGHTS_FILE
    from sa3_trt_core.artifacts import files, manifest

    names = ("prompts", "seconds", "loops", "steps", "batch", "seed", "form")
    return {
        "checkpoint": {name: files.sha256_of(args.checkpoint / name) for name in (CONFIG_FILE, WEIGHTS_FILE)},
        "dit": {args.dit.name: files.sha256_of(args.dit)} if args.dit else None,
        "settings": {name: getattr(args, name) for name in names},
        "tools": manifest.tool_versions(TOOLS),
        "threads": torch.get_num_threads(),
    }


def tables(document: dict[str, Any]) -> Iterator[str]:
    """Yield the document as text, one table per part."""
    from sa3_trt_core.console import format_seconds, table

    settings, autoencoder, inpainting = (document[name] for name in ("settings", "autoencoder", "inpainting"))
    rows = [[name.replace("_", " "), *map(cell, scores.values())] for name, scores in autoencoder["si_sdr_db"].items()]
    yield table((f"SI-SDR of {settings['loops']} loops, dB", "mean", "worst", "best"), rows)
    latent = autoencoder["latent"]
    yield f"latents: mean {cell(latent['mean'])}, deviation {cell(latent['std'])}"
    rows = []
    for name, scores in document["rates"].items():
        shares = [f"{scores[kind]['hits']}/{scores['of']} {percent(scores[kind]['rate'])}" for kind in
                  ("tempo", "key", "notes")]  # fmt: skip
        rows.append([LABELS[name], *shares])
    what = ", ".join([f"{settings['prompts']} {settings['form']} captions", *(document["dit"] or ())])
    yield table((what, "tempo within 4 %", "key", "its notes"), rows)
    bands = document["balance_db"]
    rows = [[LABELS[name], *map(cell, levels.values())] for name, levels in bands.items()]
    yield table(("level relative to the data, dB", *bands["generated"]), rows)
    rows = [
        [name, *(cell(inpainting[name].get(kind, {}).get("mean")) for kind in ("latent_relative_l2", "si_sdr_db"))]
        for name in ("conditioned", "unconditioned", "autoencoder")
    ]
    yield table((f"kept part of {len(inpainting['loops'])} in-painted loops", "latent rel L2", "SI-SDR, dB"), rows)
    rolled = document["rollouts"]
    if rolled:
        fp16_mixed, export = rolled["worst"]["half"], rolled["worst"]["export"]
        yield (
            f"rollouts, worst cosine: FP16-mixed against fp32 {fp16_mixed} (required >= {rolled['required']}), "
            f"fp32 against the checkpoint {export}"
        )
    again = document["repeated"]
    same = "identical samples" if again["identical_samples"] else "DIFFERENT SAMPLES"
    yield f"{again['clips']} clips generated twice: {same}; {format_seconds(sum(document['seconds'].values()))} in all"


def cell(value: float | None) -> str:
    """Return the text of a figure in a table."""
    return "-" if value is None else f"{value:.4g}"


def percent(rate: float | None) -> str:
    """Return the text of a rate in a table."""
    return "-" if rate is None else f"({100 * rate:.1f} %)"


if __name__ == "__main__":
    sys.exit(run_command(main))
