"""Run engines on the check rows of their graphs on this card, and print the distance of each from its graph."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sa3_trt_core import engines, paths, targets
from sa3_trt_core.cli.arguments import Parser, add_folder_flags, run_command
from sa3_trt_core.errors import GateError


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="check_engine.py", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help="targets, as build_from_onnx.py --list shows them")
    parser.add_argument(
        "--backend", choices=engines.CHOICES, default=engines.AUTO, help="backend of all targets (default: %(default)s)"
    )
    add_folder_flags(parser)
    parser.add_argument("--out", type=Path, metavar="F.json", help="also write the figures to this JSON file")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check every engine. Raises the GateError of the first wrong one (exit 3)."""
    args = make_parser().parse_args(argv)

    from sa3_trt_core import console
    from sa3_trt_core.artifacts import files
    from sa3_trt_core.engines import self_check

    if args.out is not None:
        files.require_writable(args.out, "--out")
    source = paths.ModelSource.of(args.onnx_root, args.models_dir)
    checked: list[dict[str, Any]] = []
    wrong: list[GateError] = []
    for target in targets.expand(args.names):
        backend = engines.pick_backend(args.backend, target, source.models_dir)
        try:
            outcomes = engines.check_engine(target, backend, source)
        except GateError as error:
            wrong.append(error)
            continue
        checked.append({
            "target": target.name, "backend": backend, "rows": len(outcomes),
            "worst": max((outcome.error_over_limit for outcome in outcomes), default=None),
            "outcomes": [vars(outcome) for outcome in outcomes],
            "place": vars(self_check.CheckEnvironment.of(engines.BACKENDS[backend])),
        })  # fmt: skip
    text = json.dumps({"format": 1, "engines": checked, "wrong": [error.message for error in wrong]}, indent=1)
    if args.out is not None:
        files.write_atomic_text(args.out, text + "\n")
    rows = [[entry["target"], entry["backend"], str(entry["rows"]), _share(entry["worst"])] for entry in checked]
    print(text if args.json else console.table(("target", "backend", "check rows", "worst, of the limit"), rows))
    if wrong:
        raise wrong[0]
    return 0


def _share(worst: object) -> str:
    return f"{worst:.2f}" if isinstance(worst, float) else "no rows in its graph"


if __name__ == "__main__":
    sys.exit(run_command(main))
