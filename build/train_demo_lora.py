"""Train the demonstration model's LoRA adapter, which filters its music as a wall would."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_trt_core.cli.arguments import Parser, integer_type, run_command


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="train_demo_lora.py", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="demo checkpoint (build/make_demo_checkpoint.py)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="F.safetensors", help="adapter file to write")
    parser.add_argument("--rank", type=integer_type(1, 128), default=8, help="rank of the adapter, 1..128 (default: 8)")
    parser.add_argument(
        "--captions", type=integer_type(1, 1000), default=24, help="number of training captions, 1..1000 (default: 24)"
    )
    parser.add_argument(
        "--seconds",
        type=integer_type(1, 10, "seconds"),
        default=3,
        help="length of each clip in seconds, 1..10 (default: 3)",
    )
    parser.add_argument("--steps", type=integer_type(1, 100_000), default=350, help="optimiser steps (default: 350)")
    parser.add_argument("--batch", type=integer_type(1, 64), default=8, help="rows per step, 1..64 (default: 8)")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default: cpu)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train the adapter, write it, print its size."""
    args = make_parser().parse_args(argv)

    from sa3_demo import room_adapter
    from sa3_demo.checkpoint_under_test import CheckpointUnderTest
    from sa3_trt_core.artifacts import files

    files.require_writable(args.out, "adapter")
    plan = room_adapter.RoomPlan(args.rank, args.captions, args.seconds, args.steps, args.batch)
    subject = CheckpointUnderTest(args.checkpoint, plan.seconds, 8, plan.batch, device=args.device)
    rows, pairs = room_adapter.make_pairs(subject, plan)
    adapters = room_adapter.train(subject, rows, pairs, plan)
    room_adapter.write_adapter(adapters, plan, args.out)
    print(f"{args.out}: rank {plan.rank}, {len(adapters)} layers, {args.out.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
