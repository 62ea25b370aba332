"""Measure the producer chain: seconds, peak memory and peak scratch of every step, each in its own process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sa3_trt_core import console, targets
from sa3_trt_core.artifacts import files
from sa3_trt_core.cli.arguments import Parser, integer_type, number_type, run_command
from sa3_trt_core.errors import ToolError

HERE = Path(__file__).resolve().parent
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class StepCost:
    """Cost of one step: wall seconds, peak resident bytes, peak bytes of hidden temporary files, bytes written."""

    step: str
    seconds: float
    peak_memory: int
    peak_scratch: int
    written: int


def make_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = Parser(prog="bench_producer.py", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder of all outputs; it is kept")
    parser.add_argument(
        "--geometry",
        choices=("small", "medium"),
        default="small",
        help="size of the random checkpoint (default: small)",
    )
    parser.add_argument(
        "--prompts", type=integer_type(1, 47), default=1, help="number of calibration prompts, 1..47 (default: 1)"
    )
    parser.add_argument(
        "--duration",
        type=number_type(0.5, 120, "seconds"),
        default=5.0,
        help="duration of calibration generations in seconds, 0.5..120 (default: 5, i.e. 120 latent frames)",
    )
    parser.add_argument(
        "--ptq",
        choices=("auto", "modelopt", "direct"),
        default="direct",
        help="inserter of Q/DQ pairs (default: direct)",
    )
    parser.add_argument("--arch", help="also compile sa3-m-fp8 with TensorRT-RTX for this architecture, e.g. sm_89")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run every step and print the table."""
    args = make_parser().parse_args(argv)
    work: Path = args.work.resolve()
    files.require_writable(work / "probe", "--work")
    costs = []
    for step, argv_of_step in steps(args, work):
        print(f"{step} ...", file=sys.stderr, flush=True)
        costs.append(measure(step, argv_of_step, work))
        print(f"  {json.dumps(asdict(costs[-1]))}", file=sys.stderr, flush=True)  # kept if a later step is killed
    if args.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
        return 0
    rows = [
        [m.step, f"{m.seconds:.1f}", *(console.format_bytes(n) for n in (m.peak_memory, m.peak_scratch, m.written))]
        for m in costs
    ]
    print(console.table(("step", "seconds", "peak memory", "peak scratch", "written"), rows))
    return 0


def steps(args: argparse.Namespace, work: Path) -> list[tuple[str, list[str]]]:
    """Return the chain as argument lists, in order."""
    checkpoint, root, calibration = work / "checkpoint", work / "onnx", work / "sa3-m.calib.npz"
    dit, fp16_mixed, fp8 = (root / targets.dit_target("medium", p).onnx[0] for p in ("fp32", "fp16mixed", "fp8"))
    export = ["export_onnx.py", "--model-dir", checkpoint, "--onnx-root", root]
    capture = ["make_calib.py", "--model-config", checkpoint / "model_config.json", "--checkpoint"]
    capture += [checkpoint / "model.safetensors", "--out", calibration, "--prompts", args.prompts]
    quantise = ["build_dit_fp8.py", "--input", fp16_mixed, "--calib", calibration, "--onnx", fp8, "--ptq", args.ptq]
    chain = [
        ("checkpoint", ["make_demo_checkpoint.py", "--out", checkpoint, "--random", "--geometry", args.geometry]),
        ("export text", [*export, "--only", "text"]),
        ("export DiT", [*export, "--only", "dit"]),
        ("export decoder", [*export, "--only", "decoder", "--only", "decoder-fp16"]),
        ("FP16-mixed", ["build_dit_fp16mixed.py", "--input", dit, "--onnx", fp16_mixed]),
        ("calibration", [*capture, "--duration", args.duration, "--cover", "text"]),
        ("FP8", [*quantise, "--parity-rows", "8"]),
    ]
    if args.arch:
        step_argv = ["build_from_onnx.py", "sa3-m-fp8", "--backend", "tensorrt_rtx", "--arch", args.arch]
        chain.append(("engine", [*step_argv, "--onnx-root", root, "--models-dir", work / "models"]))
    return [(step, [str(word) for word in step_argv]) for step, step_argv in chain]


def measure(step: str, step_argv: list[str], work: Path) -> StepCost:
    """Run one command and return its cost. Raises ToolError when it fails; its messages are on stderr."""
    before, scratch, started = _bytes_under(work, hidden=False), 0, time.monotonic()
    process = subprocess.Popen([sys.executable, str(HERE / step_argv[0]), *step_argv[1:]], stdout=sys.stderr)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        scratch = max(scratch, _bytes_under(work, hidden=True))
        time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ToolError(
            f"step {step} ended with {process.returncode}", f"run it alone: python build/{' '.join(step_argv)}"
        )
    seconds = time.monotonic() - started
    return StepCost(step, seconds, usage.ru_maxrss * 1024, scratch, _bytes_under(work, hidden=False) - before)


def _bytes_under(folder: Path, hidden: bool) -> int:
    """Return the bytes of hidden (or of visible) files under a folder.

    A file is hidden if its name or a parent folder's name starts with a dot.
    """
    total = 0
    for base, _, names in os.walk(folder):
        in_hidden_folder = any(part.startswith(".") for part in Path(base).relative_to(folder).parts)
        for name in names:
            if (in_hidden_folder or name.startswith(".")) == hidden:
                try:
                    status = os.stat(os.path.join(base, name))
                    total += (
                        0 if hidden and status.st_nlink > 1 else status.st_size
                    )  # hard links share the bytes of another file
                except FileNotFoundError:
                    continue  # renamed between listing and stat
    return total


if __name__ == "__main__":
    sys.exit(run_command(main))
