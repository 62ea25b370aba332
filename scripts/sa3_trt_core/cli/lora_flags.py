"""LoRA flags of all commands, and their conversion to specs and options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sa3_trt_core.lora.lora_set import LoraOptions, LoraSpec

RULES = ("native", "fade")
STACKINGS = ("chained", "summed")


def add_lora_flags(parser: argparse.ArgumentParser, required: bool = False, refits: bool = False) -> None:
    """Add an argument group with --lora and its options; `refits` adds --refit."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--lora", action="append", default=None, required=required, metavar="F[:S]",
        help="LoRA file or PEFT folder, and its strength (default: 1); repeat for several, in order",
    )  # fmt: skip
    group.add_argument(
        "--lora-rule", choices=RULES, default=RULES[0],
        help="strength of DoRA and BoRA: native scales the low-rank part alone, fade the whole change",
    )  # fmt: skip
    group.add_argument(
        "--lora-stacking", choices=STACKINGS, default=STACKINGS[0],
        help="chained: each adapter starts from the result of those before it; summed: changes of the base are added",
    )  # fmt: skip
    group.add_argument("--lora-no-duration", action="store_true", help="do not apply adapters to the duration embedder")
    group.add_argument(
        "--lora-partial", action="store_true", help="apply the layers that fit and skip the others with a warning"
    )
    if refits:
        group.add_argument(
            "--refit", action="store_true", help="TensorRT: put the merged weights into the engine without adapters"
        )
    group.add_argument(
        "--lora-bases", type=Path, metavar="model.safetensors",
        help="native checkpoint for the SVD of -xs adapters (default: the loaded weights)",
    )  # fmt: skip


def lora_specs(args: argparse.Namespace) -> list[LoraSpec]:
    """Return the adapter specs of the flags, in order. Raises ToolError."""
    from sa3_trt_core.lora.lora_set import parse_spec

    return [parse_spec(text) for text in args.lora or []]


def lora_options(args: argparse.Namespace) -> LoraOptions:
    """Return the LoraOptions of the flags."""
    from sa3_trt_core.lora.lora_set import LoraOptions

    return LoraOptions(args.lora_rule, args.lora_stacking, not args.lora_no_duration, args.lora_partial)
