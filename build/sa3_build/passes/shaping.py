"""The rewritings of a DiT graph that are on by default, and the flags that leave one out; no third-party package."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

HELP = {
    "null_row": "add the rule of the null row of guidance to a graph that has none",
    "bake_rope": "make the rotary table a constant, read up to the length of the run",
    "stack_attention": "one attention call for both halves of differential attention",
    "pad_k": "pad products whose K is no multiple of 16 (the local embedding: 257) with zeros",
}


@dataclass(frozen=True)
class Shaping:
    """One switch a rewriting; what a graph does not have is left alone."""

    null_row: bool = True
    bake_rope: bool = True
    stack_attention: bool = True
    pad_k: bool = True


def add_flags(line: argparse.ArgumentParser) -> None:
    """Add a switch for each rewriting to a command line."""
    for name, what in HELP.items():
        flag = f"--{name.replace('_', '-')}"
        line.add_argument(flag, action=argparse.BooleanOptionalAction, default=True, help=f"{what} (default: yes)")


def from_flags(args: argparse.Namespace) -> Shaping:
    """The switches of a command line."""
    return Shaping(**{field.name: getattr(args, field.name) for field in fields(Shaping)})
