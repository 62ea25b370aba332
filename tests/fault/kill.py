"""kill -9 at random moments of every command: no torn file is accepted, and a rerun of the command completes.

    python tests/fault/kill.py --runs 200 --work /tmp/kill

Every second run starts over an older result of other settings, if there is one. Prints counts; exit 1 after any
violation.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import sys
import time
from pathlib import Path

from fault import place
from fault.place import Child, Command, fresh, hub_for, torn, visible

SLOW_SECONDS, SLOW_EVERY = 8.0, 4  # a slower command runs once while the others run four times
OLDER = {  # other settings, so that the older files have other bytes
    "fp8": ["--headroom", 4],
    "calib": ["--seed", 9],
    "sound": ["--seed", 9],
    "fp16mixed": ["--no-pad-k"],
    "checkpoint": ["--seed", 9],
}


def main() -> int:
    """Run all kills and print the counts; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after this time and say so")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", action="append", help="commands by name")
    args = parser.parse_args()
    place.preload()
    tiny = args.work / "tiny"
    tiny.mkdir(parents=True, exist_ok=True)
    place.prepare(tiny)
    chosen = [command for command in place.commands(tiny) if not args.only or command.name in args.only]
    finished: dict[str, tuple[float, list[dict[str, bytes]]]]
    finished = {command.name: reference(command, tiny, args.work) for command in chosen}
    slow = {name for name, (seconds, _) in finished.items() if seconds > SLOW_SECONDS}
    turns = [command for turn in range(SLOW_EVERY) for command in chosen if turn == 0 or command.name not in slow]
    dice, counts, all_violations = random.Random(args.seed), collections.Counter[str](), list[str]()
    end = time.monotonic() + 60 * args.minutes
    for run in range(args.runs):
        if time.monotonic() > end:
            print(f"stopped after {run} of {args.runs} runs: the time is up")
            break
        command = turns[run % len(turns)]
        seconds, states = finished[command.name]
        over = len(states) > 1 and dice.random() < 0.5
        violations = attempt(command, tiny, args.work, states, over, dice.uniform(0.0, seconds), counts)
        all_violations += [f"run {run}, {command.name}: {item}" for item in violations]
        print(
            f"run {run} {command.name}{' over older' if over else ''}: {violations or 'good'}",
            file=sys.stderr,
            flush=True,
        )
    for name, count in sorted(counts.items()):
        print(f"{count:5}  {name}")
    print(f"{len(all_violations):5}  violations")
    print("\n".join(all_violations))
    return 1 if all_violations else 0


def reference(command: Command, tiny: Path, work: Path) -> tuple[float, list[dict[str, bytes]]]:
    """Return a command's duration and the files that it writes: with its own settings, and with older ones."""
    states, seconds = [], 0.0
    for variant in (command, older(command)):
        if variant is None:
            continue
        out = fresh(work / f"reference-{variant.name.replace(' ', '-')}-{len(states)}")
        with hub_for(variant, tiny, fresh(work / "cache")):
            child = Child(variant, out, work / "reference.log")
            assert child.wait() == 0, (work / "reference.log").read_text()
        seconds = seconds or child.seconds
        states.append(visible(out))
    print(f"{command.name}: {seconds:.2f} s, {len(states[0])} files", file=sys.stderr)
    return seconds, states


def older(command: Command) -> Command | None:
    """Return the command with the settings of an older run, or None."""
    words = OLDER.get(command.name)
    if words is None:
        return None
    return Command(command.name, command.module, lambda out: [*command.line(out), *words], command.hub)


def attempt(
    command: Command, tiny: Path, work: Path, states: list[dict[str, bytes]], over: bool, moment: float,
    counts: collections.Counter[str],
) -> list[str]:  # fmt: skip
    """Kill the command once and rerun it; return the violations."""
    out = fresh(work / "out")
    if over:
        for name, data in states[1].items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
    with hub_for(command, tiny, fresh(work / "cache")) as hub:
        code = Child(command, out, work / "killed.log").kill_after(moment)
        counts[f"{command.name}: killed" if code == -9 else f"{command.name}: ended before"] += 1
        violations = [f"accepted after the kill: {item}" for item in torn(out, states)]
        if hub is not None and command.module == "publish":
            violations += [
                f"half a commit: {sorted(tree)}" for tree in hub.commits.values() if len(tree) not in (1, 2, 5)
            ]
        if Child(command, out, work / "again.log").wait() != 0:
            violations.append("the rerun failed: " + (work / "again.log").read_text()[-400:])
    counts[f"{command.name}: rerun complete"] += not violations
    files = visible(out)
    for name, data in states[0].items():
        if name.endswith(place.REPEATED) and files.get(name) != data:
            violations.append(f"after the rerun {name} is {'other' if name in files else 'missing'}")
        elif name not in files:
            violations.append(f"after the rerun {name} is missing")
    violations += [f"accepted after the rerun: {item}" for item in torn(out, states)]
    hidden = [path for path in out.rglob("*") if path.name.startswith(".") and path.is_file()]
    counts["hidden leftovers after a rerun (files)"] += len(hidden)
    shutil.rmtree(work / "out", ignore_errors=True)
    return violations


if __name__ == "__main__":
    sys.exit(main())
