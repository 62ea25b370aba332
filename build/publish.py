"""Validate a finished FP8 DiT and upload it to the hub; without --send only print the plan."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sa3_trt_core import console, targets
from sa3_trt_core.cli.arguments import Parser, run_command


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="publish.py", description=__doc__)
    parser.add_argument(
        "--onnx", type=Path, required=True, metavar="F", help="dit_fp8.onnx, with its manifest and report beside it"
    )
    parser.add_argument(
        "--target-repo",
        default=targets.HUB_REPOSITORY,
        metavar="R",
        help="repository on the hub (default: %(default)s)",
    )
    parser.add_argument(
        "--branch", metavar="B", help="commit to this branch, created if necessary (default: open a pull request)"
    )
    parser.add_argument(
        "--message", default="Add the FP8 DiT", metavar="M", help="commit message (default: %(default)s)"
    )
    parser.add_argument("--send", action="store_true", help="upload; without this flag only the plan is printed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Check and print the plan; with --send, upload and read back. Raises ToolError, GateError."""
    args = make_parser().parse_args(argv)

    from sa3_build.engines import publish

    upload = publish.check(args.onnx)
    document = {
        "repository": args.target_repo,
        "to": args.branch or "a pull request",
        "files": [file.as_dict for file in upload.files],
        "gates": upload.gates,
        "sent": None,
    }
    if args.send:
        result = publish.send(upload, args.target_repo, args.branch, args.message)
        document["sent"] = {"commit": result.commit, "address": result.address, "read_back": result.read_back}
    if args.json:
        print(json.dumps(document, indent=2))
        return 0
    rows = [[file.path, console.format_bytes(file.bytes), file.sha256] for file in upload.files]
    print(console.table((f"to {args.target_repo}", "size", "sha256"), rows))
    print(", ".join(f"{name}: {value}" for name, value in upload.gates.items()))
    if args.send:
        print(f"uploaded: {result.address}\nverified: {result.read_back} files")
    else:
        print(f"nothing uploaded; --send uploads to {args.branch or 'a pull request'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
