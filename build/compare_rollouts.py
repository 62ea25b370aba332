"""Compare DiTs with a reference: 8-step generations with shared noise, single steps, the share in FP8; in one table.

How far a generation drifts is also said as the perturbation of the DiT's input x (relative L2) with which the reference
drifts as far from itself: a network amplifies what it is given, so a final cosine alone says little.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sa3_trt_core import console
from sa3_trt_core.artifacts import files
from sa3_trt_core.cli.arguments import Parser, integer_type, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="compare_rollouts.py", description=__doc__)
    line.add_argument(
        "--reference", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="what is drifted from"
    )
    line.add_argument(
        "--candidate", type=Path, required=True, action="append", metavar="dit_fp8.onnx",
        help="a DiT to judge; may be given several times",
    )  # fmt: skip
    line.add_argument("--calib", type=Path, required=True, metavar="X.npz", help="from build/make_calib.py")
    line.add_argument(
        "--prompts", type=integer_type(1, 10**6), metavar="N", help="generations: rows of sigma 1 (default all)"
    )
    line.add_argument(
        "--rows", type=integer_type(1, 10**6), default=64, metavar="N",
        help="rows for single steps, spread over the sigmas, at least one each (default 64)",
    )  # fmt: skip
    line.add_argument(
        "--perturb", choices=("every-step", "start"), default="every-step",
        help="what the controls disturb: x at every step, or the start alone, which ping-pong soon replaces by noise",
    )  # fmt: skip
    line.add_argument("--markdown", action="store_true", help="the table in Markdown")
    line.add_argument("--json", type=Path, metavar="FILE", help="also write every figure here")
    return line


def main(argv: list[str] | None = None) -> int:
    """Check everything, run one DiT after the other, print."""
    args = parser().parse_args(argv)
    if args.json is not None:
        files.require_writable(args.json, "document")

    from sa3_build.graph import contract, io as graph_io
    from sa3_build.verification import rollouts
    from sa3_trt_core.artifacts.calibration_set import CalibrationSet
    from sa3_validation.cases import starts_of

    for path in (args.reference, *args.candidate):
        contract.require_contract(graph_io.load(path), "dit", path)
    calibration = CalibrationSet.open(args.calib)
    calibration.check_values()
    starts = starts_of(calibration)[: args.prompts]
    study = rollouts.RolloutComparison(calibration, starts, args.rows, args.perturb)
    controls, found = study.run(args.reference, args.candidate)
    if args.json is not None:
        document = rollouts.document(controls, found, args.perturb)
        files.write_atomic_text(args.json, json.dumps(document, indent=2, allow_nan=False) + "\n")
    show = console.markdown if args.markdown else console.table
    print(show(rollouts.CONTROL_HEADER, rollouts.control_rows(controls)))
    print()
    print(show(rollouts.HEADER, rollouts.table_rows(found)))
    print()
    print(show(("prompt", *(one.name for one in found)), rollouts.prompt_rows(found)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
