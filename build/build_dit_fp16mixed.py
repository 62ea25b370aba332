"""Convert an fp32 DiT graph to FP16-mixed: a 16-bit trunk around fp32 islands, fp32 inputs and outputs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_build.passes import shaping
from sa3_trt_core.cli.arguments import Parser, number_type, run_command


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="build_dit_fp16mixed.py", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, metavar="dit.onnx", help="fp32 DiT graph")
    parser.add_argument(
        "--onnx", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="FP16-mixed graph to write"
    )
    parser.add_argument(
        "--min-cosine",
        type=number_type(0, 1),
        default=0.99999,
        help="minimum denoised cosine with the fp32 graph, 0..1 (default: %(default)s)",
    )
    parser.add_argument(
        "--free-batch", action=argparse.BooleanOptionalAction, default=True,
        help="make a batch axis that is fixed at 1 dynamic; fail if that is impossible (default: yes)",
    )  # fmt: skip
    shaping.add_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Convert the graph, compare it with the source, write it."""
    args = make_parser().parse_args(argv)

    from sa3_trt_core.artifacts import files

    files.require_writable(args.onnx, "graph")

    from sa3_build.recipes.fp16_mixed import build_fp16_mixed
    from sa3_trt_core import console

    result = build_fp16_mixed(args.input, args.onnx, args.min_cosine, args.free_batch, shaping.from_flags(args))
    if result is None:
        print(f"{args.onnx} is current")
        return 0
    for rewrite in result.rewrites:
        print(f"{rewrite.name}: {', '.join(f'{count} {name}' for name, count in rewrite.counts.items())}")
        for note in rewrite.notes:
            print(f"  {note}")
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items())
    print(f"{args.onnx}: {counts}; worst denoised cosine {result.worst:.8f}, {console.format_bytes(result.bytes)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
