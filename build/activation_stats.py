"""Print statistics of the activations that quantised layers of a DiT read: amax, crest, kurtosis, E4M3 underflow."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from build_dit_fp8 import DEFAULT_HEADROOM

from sa3_trt_core import console
from sa3_trt_core.artifacts import files
from sa3_trt_core.cli.arguments import Parser, integer_type, run_command
from sa3_trt_core.errors import ToolError


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="activation_stats.py", description=__doc__)
    parser.add_argument(
        "--input", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="the FP16-mixed DiT graph"
    )
    parser.add_argument(
        "--calib", type=Path, required=True, metavar="X.npz", help="calibration set from build/make_calib.py"
    )
    parser.add_argument(
        "--beside-input", type=Path, metavar="B.onnx", help="second DiT, shown in columns beside the first"
    )
    parser.add_argument("--beside-calib", type=Path, metavar="Y.npz", help="calibration set of the second DiT")
    parser.add_argument(
        "--rows", type=integer_type(1, 10**6), metavar="N",
        help="maximum number of rows, the same number at every sigma and at least one (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--by", choices=("kind", "sigma", "both"), default="both", help="grouping of the table (default: both)"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print every activation at every sigma as one JSON document")
    shape.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the JSON document to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check all inputs, measure one model after the other, print the table."""
    args = make_parser().parse_args(argv)
    pairs = [(args.input, args.calib)]
    if (args.beside_input is None) != (args.beside_calib is None):
        raise ToolError("--beside-input and --beside-calib must be used together", "give both or neither")
    if args.beside_input is not None:
        pairs.append((args.beside_input, args.beside_calib))
    if args.out is not None:
        files.require_writable(args.out, "document")

    from sa3_build.recipes import activation_stats

    subjects = [activation_stats.MeasuredDit(source, calibration, args.rows) for source, calibration in pairs]
    measured = [(subject, subject.measure(DEFAULT_HEADROOM)) for subject in subjects]
    if args.json or args.out is not None:
        document = json.dumps(activation_stats.document(measured, DEFAULT_HEADROOM), indent=2, allow_nan=False)
        if args.out is not None:
            files.write_atomic_text(args.out, document + "\n")
        if args.json:
            print(document)
            return 0
    names = ("A", "B") if len(measured) > 1 else ("",)
    bullet = "- " if args.markdown else ""
    for name, (subject, activations) in zip(names, measured, strict=True):
        print(f"{bullet}{name}{': ' if name else ''}{subject.describe()}, {len(activations)} inputs")
    by_kind, by_sigma = args.by != "sigma", args.by != "kind"
    aggregates = [activation_stats.aggregate(activations, by_kind, by_sigma) for _, activations in measured]
    print()
    print((console.markdown if args.markdown else console.table)(*activation_stats.table_of(aggregates, names)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
