"""Turn the plug-in attention of a published SAME decoder or encoder into plain ops that every backend runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_trt_core.cli.arguments import Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="lower_attention.py", description=__doc__)
    line.add_argument(
        "--input", type=Path, required=True, metavar="dec.onnx", help="the graph with samel::diff_attn_swa"
    )
    line.add_argument("--onnx", type=Path, required=True, metavar="dec_fp16.onnx", help="graph to write")
    return line


def main(argv: list[str] | None = None) -> int:
    """Lower, write, say how many."""
    args = parser().parse_args(argv)

    from sa3_trt_core.artifacts import files

    files.require_writable(args.onnx, "graph")

    from sa3_build.passes.lower_plugins import lower_file

    count = lower_file(args.input, args.onnx)
    print(f"{args.onnx} is current" if count == 0 else f"{args.onnx}: {count} window attentions lowered")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
