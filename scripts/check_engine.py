"""Run engines on the check rows of their graphs, now and on this card, and say how far each is from its graph."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from sa3_trt_core import engines, paths, targets
from sa3_trt_core.cli.arguments import Parser, run_command
from sa3_trt_core.errors import GateError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = Parser(prog="check_engine.py", description=__doc__)
    line.add_argument("names", nargs="+", metavar="NAME", help="targets, as build_from_onnx.py --list shows them")
    line.add_argument("--backend", choices=engines.CHOICES, default=engines.AUTO, help="of all (default: %(default)s)")
    line.add_argument("--onnx-root", type=Path, metavar="D", help="ONNX files (default: $SA3_ONNX_DIR, else the hub)")
    line.add_argument("--models-dir", type=Path, metavar="D", help="engines (default: $SA3_MODELS_DIR, else models)")
    line.add_argument("--out", type=Path, metavar="F.json", help="write the figures there too")
    line.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return line


def main(argv: list[str] | None = None) -> int:
    """Check every engine; exit 3 and its line for the first that is wrong."""
    args = parser().parse_args(argv)

    from sa3_trt_core import console
    from sa3_trt_core.artifacts import files
    from sa3_trt_core.engines import self_check

    if args.out is not None:
        files.require_writable(args.out, "--out")
    source = paths.ModelSource.of(args.onnx_root, args.models_dir)
    found: list[dict[str, Any]] = []
    wrong: list[GateError] = []
    for target in targets.expand(args.names):
        backend = engines.pick_backend(args.backend, target, source.models_dir)
        try:
            outcomes = engines.check_engine(target, backend, source)
        except GateError as error:
            wrong.append(error)
            continue
        found.append({
            "target": target.name, "backend": backend, "rows": len(outcomes),
            "worst": max((one.apart for one in outcomes), default=None),
            "outcomes": [vars(one) for one in outcomes], "place": vars(self_check.Place.of(engines.BACKENDS[backend])),
        })  # fmt: skip
    text = json.dumps({"format": 1, "engines": found, "wrong": [error.message for error in wrong]}, indent=1)
    if args.out is not None:
        files.write_atomic_text(args.out, text + "\n")
    rows = [[one["target"], one["backend"], str(one["rows"]), _share(one["worst"])] for one in found]
    print(text if args.json else console.table(("target", "backend", "check rows", "worst, of the limit"), rows))
    if wrong:
        raise wrong[0]
    return 0


def _share(worst: object) -> str:
    return f"{worst:.2f}" if isinstance(worst, float) else "its graph brings none"


if __name__ == "__main__":
    sys.exit(run_command(main))
