"""kill -9 at random moments of every command: nothing torn is ever accepted, and the same command again completes.

    python tests/fault/kill.py --runs 200 --work /tmp/kill

Every second run starts over an older result of other settings, where there is one. Prints counts; exit 1 if any
promise was broken.
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

SLOW_SECONDS, SLOW_EVERY = 8.0, 4  # a command that takes longer has one turn while the others have four
OLDER = {  # other settings, so that the older files have other bytes
    "fp8": ["--headroom", 4],
    "calib": ["--seed", 9],
    "sound": ["--seed", 9],
    "fp16mixed": ["--no-pad-k"],
    "checkpoint": ["--seed", 9],
}


def main() -> int:
    """Run and print the counts."""
    line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    line.add_argument("--runs", type=int, default=200)
    line.add_argument("--seed", type=int, default=1)
    line.add_argument("--minutes", type=float, default=600.0, help="stop after this time and say so")
    line.add_argument("--work", type=Path, required=True)
    line.add_argument("--only", action="append", help="commands by name")
    args = line.parse_args()
    place.preload()
    tiny = args.work / "tiny"
    tiny.mkdir(parents=True, exist_ok=True)
    place.prepare(tiny)
    chosen = [command for command in place.commands(tiny) if not args.only or command.name in args.only]
    finished: dict[str, tuple[float, list[dict[str, bytes]]]]
    finished = {command.name: reference(command, tiny, args.work) for command in chosen}
    slow = {name for name, (seconds, _) in finished.items() if seconds > SLOW_SECONDS}
    turns = [one for turn in range(SLOW_EVERY) for one in chosen if turn == 0 or one.name not in slow]
    dice, counts, broken = random.Random(args.seed), collections.Counter[str](), list[str]()
    end = time.monotonic() + 60 * args.minutes
    for run in range(args.runs):
        if time.monotonic() > end:
            print(f"stopped after {run} of {args.runs} runs: the time is up")
            break
        command = turns[run % len(turns)]
        seconds, states = finished[command.name]
        over = len(states) > 1 and dice.random() < 0.5
        said = attempt(command, tiny, args.work, states, over, dice.uniform(0.0, seconds), counts)
        broken += [f"run {run}, {command.name}: {one}" for one in said]
        print(f"run {run} {command.name}{' over older' if over else ''}: {said or 'good'}", file=sys.stderr, flush=True)
    for name, count in sorted(counts.items()):
        print(f"{count:5}  {name}")
    print(f"{len(broken):5}  promises broken")
    print("\n".join(broken))
    return 1 if broken else 0


def reference(command: Command, tiny: Path, work: Path) -> tuple[float, list[dict[str, bytes]]]:
    """How long a command takes, and the files that it leaves: with its own settings, and with older ones."""
    states, seconds = [], 0.0
    for which in (command, older(command)):
        if which is None:
            continue
        out = fresh(work / f"reference-{which.name.replace(' ', '-')}-{len(states)}")
        with hub_for(which, tiny, fresh(work / "cache")):
            child = Child(which, out, work / "reference.log")
            assert child.wait() == 0, (work / "reference.log").read_text()
        seconds = seconds or child.seconds
        states.append(visible(out))
    print(f"{command.name}: {seconds:.2f} s, {len(states[0])} files", file=sys.stderr)
    return seconds, states


def older(command: Command) -> Command | None:
    """The command with the settings of an older run."""
    words = OLDER.get(command.name)
    if words is None:
        return None
    return Command(command.name, command.module, lambda out: [*command.line(out), *words], command.hub)


def attempt(
    command: Command, tiny: Path, work: Path, states: list[dict[str, bytes]], over: bool, moment: float,
    counts: collections.Counter[str],
) -> list[str]:  # fmt: skip
    """One kill and one rerun; the promises that were broken."""
    out = fresh(work / "out")
    if over:
        for name, data in states[1].items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(data)
    with hub_for(command, tiny, fresh(work / "cache")) as hub:
        code = Child(command, out, work / "killed.log").kill_after(moment)
        counts[f"{command.name}: killed" if code == -9 else f"{command.name}: ended before"] += 1
        broken = [f"accepted after the kill: {one}" for one in torn(out, states)]
        if hub is not None and command.module == "publish":
            broken += [f"half a commit: {sorted(tree)}" for tree in hub.commits.values() if len(tree) not in (1, 2, 5)]
        if Child(command, out, work / "again.log").wait() != 0:
            broken.append("the rerun failed: " + (work / "again.log").read_text()[-400:])
    counts[f"{command.name}: rerun complete"] += not broken
    found = visible(out)
    for name, data in states[0].items():
        if name.endswith(place.REPEATED) and found.get(name) != data:
            broken.append(f"after the rerun {name} is {'other' if name in found else 'missing'}")
        elif name not in found:
            broken.append(f"after the rerun {name} is missing")
    broken += [f"accepted after the rerun: {one}" for one in torn(out, states)]
    hidden = [path for path in out.rglob("*") if path.name.startswith(".") and path.is_file()]
    counts["hidden leftovers after a rerun (files)"] += len(hidden)
    shutil.rmtree(work / "out", ignore_errors=True)
    return broken


if __name__ == "__main__":
    sys.exit(main())
