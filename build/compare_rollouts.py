"""Compare DiTs with a reference: 8-step generations with shared noise, single steps and FP8 share, in one table.

The error of a generation is also expressed as the perturbation of the DiT's input x (relative L2) that causes the same
error in the reference: a network amplifies its input, so a final cosine alone is hard to interpret.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sa3_trt_core import console
from sa3_trt_core.artifacts import files
from sa3_trt_core.cli.arguments import Parser, integer_type, run_command


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="compare_rollouts.py", description=__doc__)
    parser.add_argument("--reference", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="reference DiT")
    parser.add_argument(
        "--candidate", type=Path, required=True, action="append", metavar="dit_fp8.onnx",
        help="DiT to compare; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--calib", type=Path, required=True, metavar="X.npz", help="calibration set from build/make_calib.py"
    )
    parser.add_argument(
        "--prompts",
        type=integer_type(1, 10**6),
        metavar="N",
        help="number of generations, from rows of sigma 1 (default: all)",
    )
    parser.add_argument(
        "--rows", type=integer_type(1, 10**6), default=64, metavar="N",
        help="rows for single steps, the same number at every sigma and at least one (default: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--perturb", choices=("every-step", "start"), default="every-step",
        help="perturbation of the controls: x at every step, or the initial latents only (default: every-step)",
    )  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to this JSON file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check all inputs, run one DiT after the other, print the tables."""
    args = make_parser().parse_args(argv)
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
    comparison = rollouts.RolloutComparison(calibration, starts, args.rows, args.perturb)
    controls, candidates = comparison.run(args.reference, args.candidate)
    if args.json is not None:
        document = rollouts.document(controls, candidates, args.perturb)
        files.write_atomic_text(args.json, json.dumps(document, indent=2, allow_nan=False) + "\n")
    show = console.markdown if args.markdown else console.table
    print(show(rollouts.CONTROL_HEADER, rollouts.control_rows(controls)))
    print()
    print(show(rollouts.HEADER, rollouts.table_rows(candidates)))
    print()
    print(show(("prompt", *(candidate.name for candidate in candidates)), rollouts.prompt_rows(candidates)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
