"""Switches of the DiT graph rewrites and their command-line flags; needs no third-party package."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

HELP = {
    "null_row": "implement guidance's null row in a graph that lacks it",
    "bake_rope": "replace the computed rotary table by a constant",
    "stack_attention": "compute both halves of differential attention in one call",
    "pad_k": "pad K of linear layers to a multiple of 16 (local embedding: 257)",
}


@dataclass(frozen=True)
class Shaping:
    """One switch per rewrite; a rewrite that does not apply changes nothing."""

    null_row: bool = True
    bake_rope: bool = True
    stack_attention: bool = True
    pad_k: bool = True


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per rewrite to a parser."""
    for name, what in HELP.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=True, help=f"{what} (default: yes)")


def from_flags(args: argparse.Namespace) -> Shaping:
    """Return the switches that the parsed arguments select."""
    return Shaping(**{field.name: getattr(args, field.name) for field in fields(Shaping)})
