"""Full disks, read-only disks, two processes at once, and wrong clocks, for every command.

    python tests/fault/starve.py --rounds 3 --work /tmp/starve

Small disks are tmpfs mounts where this user may mount, else limits on the size of a file. Prints counts; exit 1 if any
violation of: two lines and no traceback, no torn file accepted, a rerun of the command completes.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fault import kill, place
from fault.place import Child, Command, fresh, hub_for, torn, visible

DECADES = (0, 2_000_000_000, 4_102_444_800)  # 1970, 2033, 2100
Counts = collections.Counter[str]


def main() -> int:
    """Run all faults and print the counts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", help="commands by name")
    parser.add_argument("--fault", action="append", choices=tuple(FAULTS))
    args = parser.parse_args()
    place.preload()
    (args.work / "tiny").mkdir(parents=True, exist_ok=True)
    place.prepare(args.work / "tiny")
    chosen = [item for item in place.commands(args.work / "tiny") if not args.only or item.name in args.only]
    finished = {command.name: kill.reference(command, args.work / "tiny", args.work) for command in chosen}
    dice, counts, all_violations, end = (
        random.Random(args.seed),
        Counts(),
        list[str](),
        time.monotonic() + 60 * args.minutes,
    )
    for turn in range(args.rounds):
        for fault in args.fault or FAULTS:
            for command in chosen:
                if time.monotonic() > end:
                    counts["not run: the time was up"] += 1
                    continue
                states = finished[command.name][1][:1]
                violations = FAULTS[fault](command, args.work, states, dice, counts)
                counts[f"{fault}: {command.name}"] += 1
                all_violations += [f"{fault}, round {turn}, {command.name}: {item}" for item in violations]
                print(f"{fault} {command.name}: {violations or 'good'}", file=sys.stderr, flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:5}  {name}")
    print(f"{len(all_violations):5}  violations")
    print("\n".join(all_violations))
    return 1 if all_violations else 0


def full_disk(
    command: Command, work: Path, states: list[dict[str, bytes]], dice: random.Random, counts: Counts
) -> list[str]:
    """Run on a disk that is too small by a random amount, then with enough space; return the violations."""
    needed = max(sum(len(data) for data in states[0].values()), 1 << 16)
    size = int(needed * dice.uniform(0.02, 0.95))
    with small_disk(work / "disk", size) as (mounted, before, grow):
        out, tiny = work / "disk", work / "tiny"
        counts["small disks that were mounts" if mounted else "small disks that were limits"] += 1
        with hub_for(command, tiny, fresh(work / "cache")):
            code = Child(command, out, work / "full.log", before).wait()
            violations = answers(code, work / "full.log", counts)
            violations += [f"accepted: {item}" for item in torn(out, states)]
            grow()
            violations += completes(command, out, work, states)
    return violations


def read_only(
    command: Command, work: Path, states: list[dict[str, bytes]], dice: random.Random, counts: Counts
) -> list[str]:
    """Run on a read-only disk; return the violations."""
    with small_disk(work / "disk", 1 << 30, "ro") as (mounted, _, _):
        if not mounted or not states[0]:
            counts["read-only: not possible here, or nothing to write"] += 1
            return []
        with hub_for(command, work / "tiny", fresh(work / "cache")):
            code = Child(command, work / "disk", work / "full.log").wait()
        return answers(code, work / "full.log", counts) + (["it said that all is well"] if code == 0 else [])


def twice(
    command: Command, work: Path, states: list[dict[str, bytes]], dice: random.Random, counts: Counts
) -> list[str]:
    """Run the command twice at once on the same output, the second a little later; return the violations."""
    out = fresh(work / "out")
    with hub_for(command, work / "tiny", fresh(work / "cache")):
        first = Child(command, out, work / "first.log")
        time.sleep(dice.uniform(0.0, 0.5))
        second = Child(command, out, work / "second.log")
        broken = []
        for child, log in ((first, "first.log"), (second, "second.log")):
            code = child.wait()
            broken += answers(code, work / log, counts)
            broken += [f"{log}: exit {code}: {(work / log).read_text()[-300:]}"] if code != 0 else []
        return broken + completes(command, out, work, states)


def clocks(
    command: Command, work: Path, states: list[dict[str, bytes]], dice: random.Random, counts: Counts
) -> list[str]:
    """Run with files of the past and the future and with a jumping clock: nothing may be rebuilt or fail."""
    out = fresh(work / "out")
    with hub_for(command, work / "tiny", fresh(work / "cache")):
        for decade in dice.sample(DECADES, len(DECADES)):
            os.environ["SOURCE_DATE_EPOCH"] = str(decade)
            code = Child(command, out, work / "first.log").wait()
            if code != 0:
                return [f"exit {code}: {(work / 'first.log').read_text()[-300:]}"]
            for path in out.rglob("*"):
                os.utime(path, (decade, decade), follow_symlinks=False)
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.onnx*")}
        broken = completes(command, out, work, states)
        again = [str(path) for path, stamp in before.items() if path.stat().st_mtime_ns != stamp]
        return [*broken, f"made again because of its time: {again[0]}"] if again else broken


FAULTS: dict[str, Callable[[Command, Path, list[dict[str, bytes]], random.Random, Counts], list[str]]] = {
    "full disk": full_disk,
    "read-only": read_only,
    "two at once": twice,
    "clocks": clocks,
}


def answers(code: int, log: Path, counts: Counts) -> list[str]:
    """Return the violations of a command's exit: success, or two lines after its progress output."""
    text = log.read_text(errors="replace")
    counts[f"exit {code}"] += 1
    if code == 0:
        return []
    if code < 0 or "Traceback" in text:
        return [f"exit {code}: {text[-600:]}"]
    lines = text.splitlines()
    if code not in (2, 3) or not any(line.startswith("error: ") for line in lines):
        return [f"exit {code} in other words: {text[-300:]}"]
    return []


def completes(command: Command, out: Path, work: Path, states: list[dict[str, bytes]]) -> list[str]:
    """Rerun the command; return the violations: it must succeed and write the files of an undisturbed run."""
    if Child(command, out, work / "again.log").wait() != 0:
        return ["the rerun failed: " + (work / "again.log").read_text()[-400:]]
    files = visible(out)
    differing = [name for name, data in states[0].items() if name not in files
             or (name.endswith(place.REPEATED) and files[name] != data)]  # fmt: skip
    return [f"after the rerun {name} is not what it should be" for name in differing] + [
        f"accepted after the rerun: {item}" for item in torn(out, states)
    ]


@contextmanager
def small_disk(
    folder: Path, size: int, mode: str = "rw"
) -> Iterator[tuple[bool, Callable[[], None] | None, Callable[[], None]]]:
    """Yield an empty disk of a size: (whether it is a mount, what the child calls first, what enlarges it)."""
    fresh(folder)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},{mode}", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        yield False, limit, lambda: None
        return
    try:
        larger = ["mount", "-o", "remount,size=1g", str(folder)]
        yield True, None, lambda: subprocess.run(larger, check=True, capture_output=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


if __name__ == "__main__":
    sys.exit(main())
