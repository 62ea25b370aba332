"""Test the project on this machine with every installed backend, and write a report folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sa3_trt_core.cli.arguments import Parser, number_type, run_command
from sa3_trt_core.errors import GateError, ToolError

REPORTS = Path(__file__).resolve().parents[1] / "build" / "reports"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="gpu_report.py", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("output/gpu-report"), metavar="DIR",
        help="report.md, report.json and logs (default: %(default)s); the rest, not for sending, in DIR/work",
    )  # fmt: skip
    parser.add_argument(
        "--tiny", action="store_true", help="use random weights of minimal size: a functional check only"
    )
    parser.add_argument(
        "--onnx-root",
        type=Path,
        metavar="D",
        help="folder of existing graphs to use instead of the demonstration model",
    )
    parser.add_argument(
        "--minutes",
        type=number_type(0.1, 600, "minutes"),
        default=10.0,
        help="time limit in minutes; later parts are skipped (default: %(default)s)",
    )
    parser.add_argument("--matrix", action="store_true", help="print the README's table of the kept reports, and exit")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run every part, write the folder; exit 3 when a part failed."""
    args = make_parser().parse_args(argv)
    if args.matrix:
        from sa3_gpu_report import page

        print(page.matrix(page.read_reports(REPORTS)))
        return 0
    from sa3_trt_core.artifacts import files

    files.require_writable(args.out / "report.json", "--out")
    if args.onnx_root is not None and not args.onnx_root.is_dir():
        raise ToolError(f"--onnx-root: {args.onnx_root} is not a folder", "omit it to use the demonstration model")
    verdict = _report(args)
    print(f"{verdict}\n{args.out / 'report.md'}")
    if not verdict.startswith("PASSED"):
        raise GateError(verdict, f"see {args.out / 'report.md'} and the logs beside it; send the folder with an issue")
    return 0


def _report(args: argparse.Namespace) -> str:
    """Write the folder; return the verdict."""
    import datetime
    import json
    import time

    from sa3_gpu_report import page
    from sa3_gpu_report.host import this_host
    from sa3_gpu_report.parts import ROOT, run_parts
    from sa3_gpu_report.plan import ReportOptions, report_parts
    from sa3_gpu_report.scrub import Scrubber

    from sa3_trt_core import __version__
    from sa3_trt_core.artifacts import files

    started, host = time.monotonic(), this_host()
    for name, what in host.missing.items():
        print(f"missing: {name}, for {what}", file=sys.stderr)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    folders = {"out": out, "project": ROOT, "python": Path(sys.prefix)}
    if args.onnx_root is not None:
        folders["onnx-root"] = args.onnx_root
    options = ReportOptions(out, args.tiny, None if args.onnx_root is None else args.onnx_root.resolve())
    outcomes = run_parts(report_parts(options, host), out, Scrubber(folders, _prompts()), args.minutes)
    about = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "version": __version__,
        "tiny": args.tiny, "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    report = page.document(host, outcomes, about)
    files.write_atomic_text(out / "report.md", page.markdown(report))
    files.write_atomic_text(out / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return str(report["verdict"])


def _prompts() -> list[str]:
    """Return the prompts that commands of the report may print."""
    import reprompt

    return list(reprompt.calibration_prompts())


if __name__ == "__main__":
    sys.exit(run_command(main))
