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
    "decoder-fp16": "half_decoder",
    "encoder": "encoder",
}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="export_onnx.py", description=__doc__)
    line.add_argument("--model-dir", type=Path, required=True, metavar="DIR", help="a native checkpoint")
    line.add_argument("--onnx-root", type=Path, required=True, metavar="ROOT", help="folder to write the graphs into")
    line.add_argument("--only", choices=tuple(PARTS), action="append", help="export this part only (may be repeated)")
    return line


def main(argv: list[str] | None = None) -> int:
    """Export what is not current."""
    args = parser().parse_args(argv)

    from sa3_trt_core.artifacts import files, locks

    files.require_writable(args.onnx_root / "probe", "ONNX folder")

    from sa3_build.export.export_checkpoint import Exporter
    from sa3_trt_core.console import Progress

    exporter = Exporter(args.model_dir, args.onnx_root)
    wanted = [part for part in PARTS if not args.only or part in args.only]
    lock = locks.held(locks.lock_path(args.onnx_root / "export"), f"an export to {args.onnx_root}")
    with lock, Progress("export", len(wanted), "graphs") as progress:
        for part in wanted:
            made = getattr(exporter, PARTS[part])()
            progress.advance(note=made.target)
            state = "current" if made.reused else f"{made.nodes} nodes"
            print(f"{made.path}: {state}, error against its source {made.error:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
