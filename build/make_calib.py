"""Capture the DiT's inputs during a checkpoint's ping-pong generations as a calibration set (.calib.npz)."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from sa3_trt_core.artifacts import calibration_kinds
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.cli.lora_flags import add_lora_flags, lora_options, lora_specs
from sa3_trt_core.shapes import MAX_SECONDS, MIN_SECONDS

TURNS = len(calibration_kinds.TURNS)
EPILOG = f"""Number of rows: prompts x steps, or twice as many with --cover deployment. There {TURNS} prompts
cover every kind of row, and {3 * TURNS} prompts cover every kind at 3 durations ({6 * TURNS * 8} rows with 8 steps).
Each row costs one forward of the DiT here, and two in build_dit_fp8.py."""


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="make_calib.py", description=__doc__, epilog=EPILOG)
    parser.add_argument(
        "--model-config", type=Path, required=True, metavar="F", help="model_config.json of the checkpoint"
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="F", help="model.safetensors of the checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="X.calib.npz", help="calibration set to write")
    parser.add_argument(
        "--duration",
        type=number_type(MIN_SECONDS, MAX_SECONDS, "seconds"),
        nargs="+",
        help="seconds, used in turn (default: 54 10 120, i.e. 646, 174 and 1292 latent frames; for text: 54)",
    )
    parser.add_argument(
        "--cover", choices=("deployment", "text"), default="deployment",
        help=f"rows: deployment is text and, for each prompt, one of {calibration_kinds.EXTRA}, in turn (default); "
        "text is text rows only",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=integer_type(1, 100), default=8, help="sampler steps per prompt, 1..100 (default: 8)"
    )
    parser.add_argument(
        "--seed", type=integer_type(0, 2**31 - 1), default=1528, help="seed of the first prompt (default: 1528)"
    )
    parser.add_argument(
        "--prompts", type=integer_type(1, 1000), metavar="N", help="use the first N music examples (default: all)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add_lora_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Capture the rows, write the calibration set, print a summary."""
    args = make_parser().parse_args(argv)

    import reprompt
    from sa3_build.calibration import plan
    from sa3_build.calibration.capture import CaptureSettings, CheckpointModel, capture, choose_prompts
    from sa3_build.calibration.writer import CalibrationWriter
    from sa3_trt_core.artifacts import calibration_set, files
    from sa3_trt_core.artifacts.build import build
    from sa3_trt_core.console import format_bytes
    from sa3_trt_core.lora.lora_set import read_loras

    files.require_writable(args.out, "calibration set")
    prompts = choose_prompts(reprompt.calibration_prompts(), args.prompts)
    seconds = tuple(args.duration or plan.DEFAULT_SECONDS[args.cover])
    settings = CaptureSettings(prompts, seconds, args.steps, args.seed, args.cover)
    loras = read_loras(lora_specs(args), lora_options(args))
    model = CheckpointModel(args.model_config, args.checkpoint, args.device, loras)
    inputs = {file.name: files.sha256_of(file) for file in (args.model_config, args.checkpoint)}
    recorded = {
        "prompts": list(prompts),
        "seconds": list(seconds),
        "steps": args.steps,
        "seed": args.seed,
        "sigmas": "sigmoid(8.2 u - 2), u from 1 to 0; first 1, last 0; times sigma_max",
        "cover": args.cover,
        **({"loras": loras.to_manifest()} if loras else {}),
        "generations": [asdict(generation) for turn in settings.generations for generation in turn],
    }
    rows = settings.rows()
    frames, kinds = [row.valid_frames for row in rows], [row.kind for row in rows]
    with build(args.out, "calibration", inputs, recorded) as draft:
        if draft is None:
            print(f"{args.out} is current")
            return 0
        writer = CalibrationWriter(args.out, len(rows), frames, {**recorded, "inputs": inputs}, kinds)
        draft.retire()
        capture(model, settings, writer)
        calibration = calibration_set.CalibrationSet.open(args.out)
        summary = calibration_set.summary(calibration, calibration.check_values())
        draft.finish([args.out], summary)
    print(f"{args.out}: {calibration.rows} rows, {format_bytes(args.out.stat().st_size)}")
    for kind, lengths in summary["kinds"].items():
        print(f"  {kind:<8}" + ", ".join(f"{count} rows of L {length}" for length, count in lengths.items()))
    print("sigmas: " + ", ".join(f"{sigma:.4f}" for sigma in summary["sigmas"]))
    for key, (low, high) in summary["ranges"].items():
        print(f"  {key:<15} {low:>10.4f} .. {high:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
