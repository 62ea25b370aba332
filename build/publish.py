"""Publish a finished FP8 DiT on the hub: checked, uploaded under its names, read back. Does nothing without --send."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from sa3_trt_core import console, targets
from sa3_trt_core.cli.arguments import Parser, run_command


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="publish.py", description=__doc__)
    line.add_argument("--onnx", type=Path, required=True, metavar="F", help="dit_fp8.onnx, with manifest and report")
    line.add_argument("--target-repo", default=targets.HUB_REPOSITORY, metavar="R", help="default: %(default)s")
    line.add_argument("--branch", metavar="B", help="commit to this branch, made if need be (default: a pull request)")
    line.add_argument("--message", default="Add the FP8 DiT", metavar="M", help="of the commit (default: %(default)s)")
    line.add_argument("--send", action="store_true", help="upload; without it only the plan is shown")
    line.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return line


def main(argv: list[str] | None = None) -> int:
    """Check, show the plan, and with --send upload and read back. Raises ToolError, GateError."""
    args = parser().parse_args(argv)

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
        print(f"sent: {result.address}\nread back: {result.read_back} files are what was sent")
    else:
        print(f"nothing was sent; --send uploads this to {args.branch or 'a pull request'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
