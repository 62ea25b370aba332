"""Time a new sa3_trt process to the end of its first DiT step, without (cold) and with (warm) cached kernels."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sa3_trt_core import console, engines, targets
from sa3_trt_core.cli.arguments import Parser, add_folder_flags, folder_argv, integer_type, number_type, run_command
from sa3_trt_core.engines.packed import CACHE_VARIABLE
from sa3_trt_core.errors import ToolError

COMMAND = Path(__file__).with_name("sa3_trt.py")
BEFORE = ("load", "text", "sample")  # stages until the first step is done
AFTER = ("decode", "write")
PROMPT = "Slow piano over soft strings, 70 BPM"
COLD, WARM = "cold", "warm"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = Parser(prog="bench_start.py", description=__doc__)
    parser.add_argument("--dit", choices=targets.DITS, default=targets.DITS[0], help="model (default: %(default)s)")
    parser.add_argument(
        "--precision", choices=targets.PRECISIONS, default="fp8", help="precision of the DiT (default: %(default)s)"
    )
    parser.add_argument("--backend", choices=engines.CHOICES, default="torch", help="backend (default: %(default)s)")
    add_folder_flags(parser)
    parser.add_argument(
        "--seconds",
        type=number_type(0.5, 380, "seconds"),
        default=54.0,
        help="length of the sound in seconds, 0.5 to 380 (default: 54)",
    )
    parser.add_argument(
        "--repeats",
        type=integer_type(1, 100),
        default=3,
        help="starts of each kind, alternating, 1 to 100 (default: 3)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Start the command repeatedly and print the time by part."""
    args = make_parser().parse_args(argv)
    line = [sys.executable, str(COMMAND), "--prompt", PROMPT, "--dit", args.dit, "--precision", args.precision]
    line += ["--backend", args.backend, "--seconds", str(args.seconds), "--steps", "1", "--seed", "0", "--json"]
    line += folder_argv(args)
    taken: dict[str, list[dict[str, float]]] = {COLD: [], WARM: []}
    with console.Progress("starts", 1 + 2 * args.repeats, "starts") as progress:
        start(line, WARM)  # the page cache then has the files for both kinds
        progress.advance(1)
        for _ in range(args.repeats):
            for kind, runs in taken.items():
                runs.append(start(line, kind))
                progress.advance(1, kind)
    medians = {kind: {part: statistics.median(run[part] for run in runs) for part in runs[0]}
             for kind, runs in taken.items()}  # fmt: skip
    ratio = medians[COLD]["seconds_to_first_step"] / medians[WARM]["seconds_to_first_step"]
    if args.json:
        print(json.dumps({"seconds": medians, "cold_over_warm": ratio, "runs": taken}, indent=2))
        return 0
    rows = [[kind, *(f"{seconds:.2f}" for seconds in parts.values())] for kind, parts in medians.items()]
    print(console.table(["start", *(part.replace("_", " ") for part in medians[COLD])], rows))
    print(f"cold over warm: {ratio:.2f}")
    return 0


def start(line: list[str], kind: str) -> dict[str, float]:
    """Return the seconds of one fresh process: Python and imports, each stage, all until the first step is done.

    Raises ToolError when it fails; its messages are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ({CACHE_VARIABLE: f"{folder}/kernels"} if kind == COLD else {})
        out = ["--out", f"{folder}/sound.wav", "--quiet"]
        began = time.perf_counter()
        done = subprocess.run([*line, *out], stdout=subprocess.PIPE, env=environment, check=False)
        seconds = time.perf_counter() - began
    if done.returncode:
        raise ToolError(f"sa3_trt ended with {done.returncode}", f"run it alone: {' '.join(line)} --out sound.wav")
    stages: dict[str, Any] = json.loads(done.stdout)["timings"]
    parts = {stage: float(stages[stage]) for stage in BEFORE}
    whole = seconds - sum(float(stages[stage]) for stage in AFTER)
    return {"python_and_imports": whole - sum(parts.values()), **parts, "seconds_to_first_step": whole}


if __name__ == "__main__":
    sys.exit(run_command(main))
