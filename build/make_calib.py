"""Capture the DiT's inputs from a checkpoint's own ping-pong generation as a calibration set (.calib.npz)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_trt_core.errors import Parser, integer_type, number_type, run_command
from sa3_trt_core.shapes import MAX_SECONDS, MIN_SECONDS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = Parser(prog="make_calib.py", description=__doc__)
    line.add_argument(
        "--model-config", type=Path, required=True, metavar="F", help="the checkpoint's model_config.json"
    )
    line.add_argument("--checkpoint", type=Path, required=True, metavar="F", help="the checkpoint's model.safetensors")
    line.add_argument("--out", type=Path, required=True, metavar="X.calib.npz", help="file to write")
    line.add_argument(
        "--duration",
        type=number_type(MIN_SECONDS, MAX_SECONDS, "seconds"),
        default=54.0,
        help="seconds (default 54: L 646)",
    )
    line.add_argument("--steps", type=integer_type(1, 100), default=8, help="sampler steps a prompt (default 8)")
    line.add_argument(
        "--seed", type=integer_type(0, 2**31 - 1), default=1528, help="of the first prompt (default 1528)"
    )
    line.add_argument(
        "--prompts", type=integer_type(1, 1000), metavar="N", help="the first N Music examples (default all)"
    )
    line.add_argument("--device", default="auto", help="auto, cpu or cuda (default auto)")
    return line


def main(argv: list[str] | None = None) -> int:
    """Capture, write, summarise."""
    args = parser().parse_args(argv)

    import reprompt
    from sa3_build import calib
    from sa3_build.capture import CaptureSettings, CheckpointModel, capture, choose_prompts
    from sa3_trt_core import files, manifest
    from sa3_trt_core.console import format_bytes

    files.require_writable(args.out, "calibration set")
    prompts = choose_prompts(reprompt.calibration_prompts(), args.prompts)
    settings = CaptureSettings(prompts, args.duration, args.steps, args.seed)
    model = CheckpointModel(args.model_config, args.checkpoint, args.device)
    inputs = {file.name: files.sha256_of(file) for file in (args.model_config, args.checkpoint)}
    recorded = {
        "prompts": list(prompts),
        "seconds": args.duration,
        "steps": args.steps,
        "seed": args.seed,
        "sigmas": "sigmoid(8.2 u - 2), u from 1 to 0; first 1, last 0",
    }
    if manifest.is_current(args.out, inputs, recorded)[0]:
        print(f"{args.out} is current")
        return 0
    rows = len(prompts) * args.steps
    writer = calib.CalibrationWriter(args.out, rows, settings.frames, {**recorded, "inputs": inputs})
    manifest.manifest_path(args.out).unlink(missing_ok=True)
    capture(model, settings, writer)

    made = calib.CalibrationSet.open(args.out)
    found = calib.summary(made, made.check_values())
    manifest.write_manifest(args.out, "calibration", [args.out], inputs, recorded, found)
    print(f"{args.out}: {made.rows} rows, L {made.frames}, {format_bytes(args.out.stat().st_size)}")
    print("sigmas: " + ", ".join(f"{sigma:.4f}" for sigma in found["sigmas"]))
    for key, (low, high) in found["ranges"].items():
        print(f"  {key:<15} {low:>10.4f} .. {high:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
