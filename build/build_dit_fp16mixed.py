"""Turn an fp32 DiT graph into the FP16-mixed one: a 16-bit trunk around fp32 islands, fp32 in and out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_build.passes import shaping
from sa3_trt_core.cli.arguments import Parser, number_type, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="build_dit_fp16mixed.py", description=__doc__)
    line.add_argument("--input", type=Path, required=True, metavar="dit.onnx", help="the fp32 DiT graph")
    line.add_argument("--onnx", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="graph to write")
    line.add_argument("--min-cosine", type=number_type(0, 1), default=0.99999, help="gate on the denoised latent")
    line.add_argument(
        "--free-batch", action=argparse.BooleanOptionalAction, default=True,
        help="make a batch axis that is fixed at 1 dynamic, or refuse the graph (default: yes)",
    )  # fmt: skip
    shaping.add_flags(line)
    return line


def main(argv: list[str] | None = None) -> int:
    """Convert, compare, keep."""
    args = parser().parse_args(argv)

    from sa3_trt_core.artifacts import files

    files.require_writable(args.onnx, "graph")

    from sa3_build.recipes.fp16_mixed import build_fp16_mixed
    from sa3_trt_core import console

    made = build_fp16_mixed(args.input, args.onnx, args.min_cosine, args.free_batch, shaping.from_flags(args))
    if made is None:
        print(f"{args.onnx} is current")
        return 0
    for one in made.rewrites:
        print(f"{one.name}: {', '.join(f'{count} {name}' for name, count in one.counts.items())}")
        for note in one.notes:
            print(f"  {note}")
    counts = ", ".join(f"{count} {name}" for name, count in made.counts.items())
    print(f"{args.onnx}: {counts}; worst denoised cosine {made.worst:.8f}, {console.format_bytes(made.bytes)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
