"""Replace the plug-in attention of a published SAME decoder or encoder by standard ONNX ops."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_trt_core.cli.arguments import Parser, run_command


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="lower_attention.py", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="dec.onnx", help="graph with samel::diff_attn_swa")
    parser.add_argument("--onnx", type=Path, required=True, metavar="dec_fp16.onnx", help="graph to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Lower the plug-ins, write the graph, print their number."""
    args = make_parser().parse_args(argv)

    from sa3_trt_core.artifacts import files

    files.require_writable(args.onnx, "graph")

    from sa3_build.passes.lower_plugins import lower_file

    count = lower_file(args.input, args.onnx)
    print(f"{args.onnx} is current" if count == 0 else f"{args.onnx}: {count} window attentions lowered")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
