"""Time the DiT step of the PyTorch engine beside its peers, on random weights of full size: no checkpoint needed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_trt_core.errors import Parser, ToolError, integer_type, run_command

LENGTHS = (323, 646, 1292, 4096)
RING_LENGTH = 646
RING_BATCHES = (2, 4, 8)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = Parser(prog="bench_dit.py", description=__doc__)
    line.add_argument("--out", type=Path, required=True, help="folder of bench.json, bench.md and bench.png")
    frames = integer_type(1, 4096)
    line.add_argument("--lengths", type=frames, nargs="+", default=list(LENGTHS), help="latent frames, one row")
    line.add_argument(
        "--batches", type=integer_type(1, 8), nargs="*", default=list(RING_BATCHES), help="rows of a ring of 646 frames"
    )
    line.add_argument("--precisions", nargs="+", choices=("fp8", "fp16mixed"), default=["fp8", "fp16mixed"])
    line.add_argument(
        "--peers", nargs="*", choices=("eager", "compiled", "torchao"), default=["eager", "compiled"],
        help="diffusers in fp16: eager, its blocks compiled, and these with torchao's float8",
    )  # fmt: skip
    line.add_argument("--repeats", type=integer_type(1, 10_000), default=200, help="timings of each, taking turns")
    line.add_argument("--tiny", action="store_true", help="a tiny DiT, also on a CPU: shows that it runs, and no more")
    return line


def main(argv: list[str] | None = None) -> int:
    """Time, check, write the report."""
    args = parser().parse_args(argv)

    from sa3_trt_core import files

    files.require_writable(args.out / "bench.json", "--out")

    import torch

    if not torch.cuda.is_available() and not args.tiny:
        raise ToolError("the benchmark needs an NVIDIA GPU", "--tiny runs a tiny DiT on this machine")

    from sa3_bench import peers, record

    named = {"eager": peers.EAGER, "compiled": peers.COMPILED, "torchao": peers.TORCHAO}
    wanted = [*args.precisions, *(named[name] for name in args.peers)]
    shapes = [(1, frames) for frames in args.lengths] + [(rows, RING_LENGTH) for rows in args.batches]
    found = record.run(wanted, shapes, args.repeats, args.tiny, args.out)
    print(found.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
