"""Train the shipped demonstration model: synthetic loops, an autoencoder, a DiT, and its distillation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    from sa3_demo.plan import TrainingPlan


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="train_demo_model.py", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the training state and the encoded loops")
    parser.add_argument(
        "--minutes",
        type=number_type(0.001, 600, "minutes"),
        help="save and stop after this many minutes; the same command resumes",
    )
    parser.add_argument("--ship", type=Path, help="write 16-bit weights to this folder after distillation")
    parser.add_argument("--start-from", type=Path, help="start from shipped weights if --work has no state")
    parser.add_argument(
        "--from-stage", choices=("flow",),
        help="with --start-from: keep only its autoencoder and tokenizer, and train the rest from this stage",
    )  # fmt: skip
    parser.add_argument(
        "--stages", type=integer_type(1, 3), help="stop after this many stages, 1..3; the same command resumes"
    )
    parser.add_argument(
        "--note", default="", metavar="TEXT", help="note for training.json, e.g. the reason of the training"
    )
    parser.add_argument("--copy-state", type=Path, help="copy the state to this folder at the end")
    parser.add_argument(
        "--workers", type=integer_type(1, 256), help="rendering processes, 1..256 (default: CPU cores minus 2)"
    )
    parser.add_argument(
        "--shorten", type=integer_type(1, 1_000_000), nargs=3, metavar=("STEPS", "ROWS", "LOOPS"),
        help="reduced plan for the current stage; also runs without a GPU",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="a few steps of a tiny model on a CPU, for tests")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Train until the last stage, --stages or --minutes."""
    args = make_parser().parse_args(argv)
    if args.from_stage and not args.start_from:
        raise ToolError(
            "--from-stage requires --start-from", "add --start-from with the folder whose autoencoder is kept"
        )

    from sa3_trt_core.artifacts import files

    files.require_writable(args.work / "state" / "state.json", "--work")
    for folder in filter(None, (args.ship, args.copy_state)):
        files.require_writable(folder / "README.md", str(folder))

    import torch

    from sa3_demo import ship, state
    from sa3_demo.run import STAGES, Run
    from sa3_demo.trainer import Deadline

    device = torch.device("cuda" if torch.cuda.is_available() and not args.tiny else "cpu")
    if device.type == "cpu" and not args.tiny and not args.shorten:
        raise ToolError(
            "training requires an NVIDIA GPU",
            "--tiny tests the code on a CPU; --shorten 700 16 1000 trains a reduced stage in 90 minutes",
        )
    training_plan = _begin(args)
    run = Run(args.work, training_plan, device, Deadline(args.minutes), args.workers)
    stage = run.go(1 if args.shorten else args.stages or len(STAGES))
    if args.copy_state:
        state.copy(run.folder, args.copy_state)
    if args.ship and stage in ("distillation", "done"):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        made_with = {"device": name, "torch": torch.__version__, "note": args.note}
        ship.write_shipped(run.state, run.plan, run.folder / ship.TOKENIZER_FILE, args.ship, made_with)
        print(f"{args.ship}: {ship.shipped_bytes(args.ship) / 1e6:.1f} MB")
    print(
        f"{args.work}: {stage}"
        + ("" if stage == "done" else f", step {run.state.step}: run the same command to continue")
    )
    return 0


def _begin(args: argparse.Namespace) -> TrainingPlan:
    """Start an empty --work with the weights of --start-from; return the plan."""
    from sa3_demo import plan, ship, state

    folder: Path = args.work / "state"
    training_plan = plan.TINY if args.tiny else plan.FULL
    if args.start_from and not (folder / state.INDEX).is_file():
        state_to_start = ship.read_state(args.start_from, training_plan.size, args.from_stage)
        state.start(folder, state_to_start, args.start_from / ship.TOKENIZER_FILE)
    if not args.shorten:
        return training_plan
    under_way = state.load(folder).stage
    if under_way == "done":
        raise ToolError(f"training in {args.work} is complete", "choose another --work folder")
    return plan.shortened(training_plan, under_way, *args.shorten)


if __name__ == "__main__":
    sys.exit(run_command(main))
