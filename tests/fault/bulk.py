"""Kill workers, and the head of Ray, during bulk jobs, and rerun the same command until nothing is missing.

    python tests/fault/bulk.py --onnx-root output/demo/onnx --kills 50 --rows 60 --work D

Prints one JSON document; exit 1 if a sound is missing, torn, duplicated or differs from that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_RUNS = 40


def children(parent: int) -> Iterator[tuple[int, str]]:
    """Yield (id, command line) of every descendant process."""
    below: dict[int, list[tuple[int, str]]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            below.setdefault(above, []).append((int(folder.name), (folder / "cmdline").read_text()))
        except OSError:
            continue
    queue = [parent]
    while queue:
        for pid, words in below.get(queue.pop(), []):
            yield pid, words
            queue.append(pid)


def victim(process: subprocess.Popen[bytes], draw: random.Random, head: bool) -> int | None:
    """Return the id of a worker, or of a head process, of the command's own Ray; None if there is none."""
    processes = list(children(process.pid))
    workers = [pid for pid, words in processes if words.startswith("ray::Worker")]
    heads = [pid for pid, words in processes if "gcs_server" in words.split("\0")[0] or words.startswith("raylet")]
    candidates = heads if head and workers else workers
    return draw.choice(candidates) if candidates else None


def run_and_kill(argv: list[str], draw: random.Random, left: int, pause: float) -> tuple[int, int, int]:
    """Run the command once and kill processes at random; return (exit code, workers killed, heads killed)."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = heads = 0
    while process.poll() is None:
        time.sleep(draw.uniform(0.3, pause))
        if workers + heads >= left:
            continue
        head = draw.random() < 0.1
        pid = victim(process, draw, head)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            workers, heads = (workers, heads + 1) if head else (workers + 1, heads)
    return process.wait(), workers, heads


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("[0-9]*")}


def main() -> int:
    """Run the test and print its figures; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--onnx-root", type=Path, required=True)
    parser.add_argument("--precision", default="fp8")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--pause", type=float, default=12.0, metavar="S", help="at most, between two kills")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prompts = args.work / "prompts.txt"
    prompts.write_text("".join(f"sound {number}\n" for number in range(args.rows)))
    argv = [sys.executable, "-m", "sa3_trt", "--prompts-file", prompts, "--onnx-root", args.onnx_root, "--seed", 5]
    argv += ["--backend", "onnxruntime", "--precision", args.precision, "--seconds", args.seconds, "--quiet"]
    spread = [str(word) for word in [*argv, "--devices", "cpu,cpu", "--depth", 2, "--out-dir", args.work / "killed"]]
    draw, report = random.Random(18), {"runs": 0, "workers_killed": 0, "heads_killed": 0}
    code = 1
    while code != 0 and report["runs"] < MAX_RUNS:
        left = args.kills - report["workers_killed"] - report["heads_killed"]
        code, workers, heads = run_and_kill(spread, draw, left, args.pause)
        report["runs"] += 1
        report["workers_killed"] += workers
        report["heads_killed"] += heads
    alone = [str(word) for word in [*argv, "--shard", "1/1", "--out-dir", args.work / "alone"]]
    subprocess.run(alone, check=True, stdout=subprocess.DEVNULL)
    actual, expected = digests(args.work / "killed"), digests(args.work / "alone")
    figures: dict[str, Any] = {
        **report, "exit_code": code, "rows": args.rows, "missing": len(expected.keys() - actual.keys()),
        "left_over": len(actual.keys() - expected.keys()),
        "unequal": sum(actual[name] != expected[name] for name in actual.keys() & expected.keys()),
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    return 0 if code == 0 and actual == expected else 1


if __name__ == "__main__":
    sys.exit(main())
