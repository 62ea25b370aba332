"""Kill workers, and the head of Ray, during bulk jobs, and start the same command again until nothing is missing.

    python tests/fault/bulk.py --onnx-root output/demo/onnx --kills 50 --rows 60 --work D

Prints one JSON document; exit 1 when a sound is missing, torn, there twice or not the one that it is without a fault.
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

MOST_RUNS = 40


def children(parent: int) -> Iterator[tuple[int, str]]:
    """(id, command line) of every process below another."""
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
    """A worker of a command's own Ray, or what runs the whole of it."""
    found = list(children(process.pid))
    workers = [pid for pid, words in found if words.startswith("ray::Worker")]
    heads = [pid for pid, words in found if "gcs_server" in words.split("\0")[0] or words.startswith("raylet")]
    wanted = heads if head and workers else workers
    return draw.choice(wanted) if wanted else None


def run_and_kill(line: list[str], draw: random.Random, left: int, pause: float) -> tuple[int, int, int]:
    """Run the command once and kill at random; (exit code, workers killed, heads killed)."""
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    """Run all of it."""
    parse = argparse.ArgumentParser()
    parse.add_argument("--onnx-root", type=Path, required=True)
    parse.add_argument("--precision", default="fp8")
    parse.add_argument("--kills", type=int, default=50)
    parse.add_argument("--rows", type=int, default=60)
    parse.add_argument("--seconds", type=float, default=2.0)
    parse.add_argument("--pause", type=float, default=12.0, metavar="S", help="at most, between two kills")
    parse.add_argument("--work", type=Path, required=True)
    args = parse.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    prompts = args.work / "prompts.txt"
    prompts.write_text("".join(f"sound {number}\n" for number in range(args.rows)))
    argv = [sys.executable, "-m", "sa3_trt", "--prompts-file", prompts, "--onnx-root", args.onnx_root, "--seed", 5]
    argv += ["--backend", "onnxruntime", "--precision", args.precision, "--seconds", args.seconds, "--quiet"]
    spread = [str(word) for word in [*argv, "--devices", "cpu,cpu", "--depth", 2, "--out-dir", args.work / "killed"]]
    draw, report = random.Random(18), {"runs": 0, "workers_killed": 0, "heads_killed": 0}
    code = 1
    while code != 0 and report["runs"] < MOST_RUNS:
        left = args.kills - report["workers_killed"] - report["heads_killed"]
        code, workers, heads = run_and_kill(spread, draw, left, args.pause)
        report["runs"] += 1
        report["workers_killed"] += workers
        report["heads_killed"] += heads
    alone = [str(word) for word in [*argv, "--shard", "1/1", "--out-dir", args.work / "alone"]]
    subprocess.run(alone, check=True, stdout=subprocess.DEVNULL)
    found, wanted = digests(args.work / "killed"), digests(args.work / "alone")
    figures: dict[str, Any] = {
        **report, "exit_code": code, "rows": args.rows, "missing": len(wanted.keys() - found.keys()),
        "left_over": len(found.keys() - wanted.keys()),
        "unequal": sum(found[name] != wanted[name] for name in found.keys() & wanted.keys()),
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    return 0 if code == 0 and found == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
