"""Export a native checkpoint as ONNX graphs: text encoder, DiT, SAME decoder (and FP16-mixed) and encoder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_trt_core.cli.arguments import Parser, run_command

PARTS = {
    "text": "text_encoder",
    "dit": "dit",
    "decoder": "decoder",
    "decoder-fp16": "fp16_decoder",
    "encoder": "encoder",
}


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="export_onnx.py", description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, metavar="DIR", help="folder of a native checkpoint")
    parser.add_argument("--onnx-root", type=Path, required=True, metavar="ROOT", help="output folder of the graphs")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="export this part only (may be repeated)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Export every graph that is not current."""
    args = make_parser().parse_args(argv)

    from sa3_trt_core.artifacts import files, locks

    files.require_writable(args.onnx_root / "probe", "ONNX folder")

    from sa3_build.export.export_checkpoint import Exporter
    from sa3_trt_core.console import Progress

    exporter = Exporter(args.model_dir, args.onnx_root)
    parts = [part for part in PARTS if not args.only or part in args.only]
    lock = locks.exclusive_lock(locks.lock_path(args.onnx_root / "export"), f"an export to {args.onnx_root}")
    with lock, Progress("export", len(parts), "graphs") as progress:
        for part in parts:
            exported = getattr(exporter, PARTS[part])()
            progress.advance(note=exported.target)
            state = "current" if exported.reused else f"{exported.nodes} nodes"
            print(f"{exported.path}: {state}, error against its source {exported.error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
