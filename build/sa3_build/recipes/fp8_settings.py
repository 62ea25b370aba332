"""The settings of an FP8 build from a command line."""

from __future__ import annotations

import argparse

from sa3_build.passes import shaping
from sa3_build.quantization.settings import Settings
from sa3_trt_core.errors import ToolError


def from_arguments(args: argparse.Namespace) -> tuple[Settings, str]:
    """The settings of a build_dit_fp8.py command line, and why this inserter. Raises ToolError for flags at odds."""
    from sa3_build.graph import io as graph_io
    from sa3_build.quantization import reference_recipe
    from sa3_build.recipes import requirements_check

    if args.max_fp16_products is not None and args.target_cosine is None:
        raise ToolError("--max-fp16-products limits --target-cosine, which is not given", "give both or neither")
    reference = args.recipe == "reference"
    if reference and args.target_cosine is not None:
        raise ToolError("--recipe reference has no --target-cosine", "leave one of them out")
    if reference:
        ptq, why = "direct", "ModelOpt would give every output channel its own scale"
    elif args.ptq == "auto":
        ptq, why = requirements_check.choose_ptq(graph_io.bytes_of(args.input))
    else:
        ptq, why = args.ptq, "as asked"
    settings = Settings(
        ptq, reference_recipe.HEADROOM if reference else args.headroom,
        args.weights, args.min_cosine, args.parity_rows, args.free_batch,
        target_cosine=args.target_cosine, max_fp16_products=args.max_fp16_products, recipe=args.recipe,
        rounding=_rounding(args), rollouts=args.rollouts, shaping=shaping.from_flags(args),
    )  # fmt: skip
    return settings, why


def _rounding(args: argparse.Namespace) -> str:
    """As asked; else by GPTQ wherever the codes themselves are stored and the recipe is ours."""
    possible = args.weights == "fp8" and args.recipe == "ours"
    if args.rounding == "gptq" and not possible:
        at_odds = "--weights fp16" if args.weights != "fp8" else "--recipe reference"
        raise ToolError(
            f"--rounding gptq chooses the codes that are stored, and {at_odds} goes without", "leave one of them out"
        )
    return str(args.rounding or ("gptq" if possible else "nearest"))
