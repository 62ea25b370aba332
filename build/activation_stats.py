"""Show what enters the FP8 products of a FP16-mixed DiT, by kind of product and by sigma: what FP8 has to survive."""

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


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="activation_stats.py", description=__doc__)
    line.add_argument(
        "--input", type=Path, required=True, metavar="dit_fp16mixed.onnx", help="the FP16-mixed DiT graph"
    )
    line.add_argument("--calib", type=Path, required=True, metavar="X.npz", help="from build/make_calib.py")
    line.add_argument("--beside-input", type=Path, metavar="B.onnx", help="a second DiT, in columns beside the first")
    line.add_argument("--beside-calib", type=Path, metavar="Y.npz", help="the calibration set of the second DiT")
    line.add_argument(
        "--rows", type=integer_type(1, 10**6), metavar="N",
        help="rows to look at, spread over the sigmas, at least one each (default all)",
    )  # fmt: skip
    line.add_argument(
        "--by", choices=("kind", "sigma", "both"), default="both", help="what the table tells apart (default both)"
    )
    shape = line.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="every activation at every sigma, one document on stdout")
    shape.add_argument("--markdown", action="store_true", help="the table in Markdown")
    line.add_argument("--out", type=Path, metavar="FILE.json", help="also write the document of --json here")
    return line


def main(argv: list[str] | None = None) -> int:
    """Check everything, run the models one after the other, print."""
    args = parser().parse_args(argv)
    pairs = [(args.input, args.calib)]
    if (args.beside_input is None) != (args.beside_calib is None):
        raise ToolError("--beside-input and --beside-calib go together", "give both or neither")
    if args.beside_input is not None:
        pairs.append((args.beside_input, args.beside_calib))
    if args.out is not None:
        files.require_writable(args.out, "document")

    from sa3_build.recipes import activation_stats as library

    subjects = [library.MeasuredDit(source, calibration, args.rows) for source, calibration in pairs]
    measured = [(subject, subject.measure(DEFAULT_HEADROOM)) for subject in subjects]
    if args.json or args.out is not None:
        document = json.dumps(library.document(measured, DEFAULT_HEADROOM), indent=2, allow_nan=False)
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
    sides = [library.aggregate(activations, by_kind, by_sigma) for _, activations in measured]
    print()
    print((console.markdown if args.markdown else console.table)(*library.table_of(sides, names)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
