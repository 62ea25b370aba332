"""Measure what each rewriting of a DiT's shape does: nodes, bytes, parity with the fp32 graph and time of a forward."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from sa3_trt_core.errors import Parser, run_command


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = Parser(prog="bench_shape.py", description=__doc__)
    line.add_argument("--input", type=Path, required=True, metavar="dit.onnx", help="an fp32 DiT graph")
    line.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return line


def main(argv: list[str] | None = None) -> int:
    """Build the FP16-mixed DiT with no pass, with each alone and with all; nothing is kept."""
    args = parser().parse_args(argv)

    from sa3_build import shape_bench
    from sa3_build.shaping import Shaping
    from sa3_trt_core import console

    names = [field.name for field in fields(Shaping)]
    variants = {"none": Shaping(**dict.fromkeys(names, False))}
    variants |= {name.replace("_", "-"): Shaping(**{one: one == name for one in names}) for name in names}
    variants["all"] = Shaping()
    with tempfile.TemporaryDirectory(prefix="bench-shape") as scratch:
        rows = [
            shape_bench.measured(args.input, Path(scratch) / name / "dit.onnx", name, shaping).cells()
            for name, shaping in variants.items()
        ]
    show = console.markdown if args.markdown else console.table
    print(show(shape_bench.HEADER, rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
