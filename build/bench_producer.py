"""Measure the producer chain: seconds, peak memory and peak scratch of every step, each in a process of its own."""

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
class Measured:
    """One step: wall seconds, peak resident bytes, peak bytes of hidden temporary files, bytes that stayed."""

    step: str
    seconds: float
    peak_memory: int
    peak_scratch: int
    made: int


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    line = Parser(prog="bench_producer.py", description=__doc__)
    line.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for everything (kept)")
    line.add_argument(
        "--geometry", choices=("small", "medium"), default="small", help="of the checkpoint (default small)"
    )
    line.add_argument("--prompts", type=integer_type(1, 47), default=1, help="to calibrate on (default 1)")
    line.add_argument(
        "--duration", type=number_type(0.5, 120, "seconds"), default=5.0, help="of them (default 5: L 120)"
    )
    line.add_argument(
        "--ptq", choices=("auto", "modelopt", "direct"), default="direct", help="who quantises (default direct)"
    )
    line.add_argument("--arch", help="also compile sa3-m-fp8 with TensorRT-RTX, e.g. sm_89")
    line.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return line


def main(argv: list[str] | None = None) -> int:
    """Run every step and print the table."""
    args = parser().parse_args(argv)
    work: Path = args.work.resolve()
    files.require_writable(work / "probe", "--work")
    measured = []
    for step, line in steps(args, work):
        print(f"{step} ...", file=sys.stderr, flush=True)
        measured.append(measure(step, line, work))
        print(f"  {json.dumps(asdict(measured[-1]))}", file=sys.stderr, flush=True)  # kept if a later step is killed
    if args.json:
        print(json.dumps([asdict(one) for one in measured], indent=2))
        return 0
    rows = [
        [m.step, f"{m.seconds:.1f}", *(console.format_bytes(n) for n in (m.peak_memory, m.peak_scratch, m.made))]
        for m in measured
    ]
    print(console.table(("step", "seconds", "peak memory", "peak scratch", "made"), rows))
    return 0


def steps(args: argparse.Namespace, work: Path) -> list[tuple[str, list[str]]]:
    """Return the chain as command lines, in order."""
    checkpoint, root, calibration = work / "checkpoint", work / "onnx", work / "sa3-m.calib.npz"
    dit, half, fp8 = (root / targets.dit_target("medium", p).onnx[0] for p in ("fp32", "fp16mixed", "fp8"))
    export = ["export_onnx.py", "--model-dir", checkpoint, "--onnx-root", root]
    capture = ["make_calib.py", "--model-config", checkpoint / "model_config.json", "--checkpoint"]
    capture += [checkpoint / "model.safetensors", "--out", calibration, "--prompts", args.prompts]
    quantise = ["build_dit_fp8.py", "--input", half, "--calib", calibration, "--onnx", fp8, "--ptq", args.ptq]
    chain = [
        ("checkpoint", ["make_demo_checkpoint.py", "--out", checkpoint, "--random", "--geometry", args.geometry]),
        ("export text", [*export, "--only", "text"]),
        ("export DiT", [*export, "--only", "dit"]),
        ("export decoder", [*export, "--only", "decoder", "--only", "decoder-fp16"]),
        ("FP16-mixed", ["build_dit_fp16mixed.py", "--input", dit, "--onnx", half]),
        ("calibration", [*capture, "--duration", args.duration, "--cover", "text"]),
        ("FP8", [*quantise, "--parity-rows", "8"]),
    ]
    if args.arch:
        line = ["build_from_onnx.py", "sa3-m-fp8", "--backend", "tensorrt_rtx", "--arch", args.arch]
        chain.append(("engine", [*line, "--onnx-root", root, "--models-dir", work / "models"]))
    return [(step, [str(word) for word in line]) for step, line in chain]


def measure(step: str, line: list[str], work: Path) -> Measured:
    """Run one command and watch it. Raises ToolError when it fails; its own words are on stderr."""
    before, scratch, started = _bytes_under(work, hidden=False), 0, time.monotonic()
    process = subprocess.Popen([sys.executable, str(HERE / line[0]), *line[1:]], stdout=sys.stderr)
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        scratch = max(scratch, _bytes_under(work, hidden=True))
        time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ToolError(f"step {step} ended with {process.returncode}", f"run it alone: python build/{' '.join(line)}")
    seconds = time.monotonic() - started
    return Measured(step, seconds, usage.ru_maxrss * 1024, scratch, _bytes_under(work, hidden=False) - before)


def _bytes_under(folder: Path, hidden: bool) -> int:
    """Return bytes of files under a folder that are (or are not) temporary: below or themselves a dotted name."""
    total = 0
    for base, _, names in os.walk(folder):
        below = any(part.startswith(".") for part in Path(base).relative_to(folder).parts)
        for name in names:
            if (below or name.startswith(".")) == hidden:
                try:
                    found = os.stat(os.path.join(base, name))
                    total += 0 if hidden and found.st_nlink > 1 else found.st_size  # linked: another file's bytes
                except FileNotFoundError:
                    continue  # renamed into place between the listing and the look
    return total


if __name__ == "__main__":
    sys.exit(run_command(main))
