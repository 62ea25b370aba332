"""QuantizationSettings of an FP8 build, from parsed arguments."""

from __future__ import annotations

import argparse

from sa3_build.passes import shaping
from sa3_build.quantization.settings import QuantizationSettings
from sa3_trt_core.errors import ToolError


def from_arguments(args: argparse.Namespace) -> tuple[QuantizationSettings, str]:
    """Return the settings of a build_dit_fp8.py command line, and the reason for the inserter.

    Raises ToolError for flags that exclude each other.
    """
    from sa3_build.graph import io as graph_io
    from sa3_build.quantization import reference_recipe
    from sa3_build.recipes import requirements_check

    if args.max_fp16_products is not None and args.target_cosine is None:
        raise ToolError("--max-fp16-linears requires --target-cosine", "give both or neither")
    reference = args.recipe == "reference"
    if reference and args.target_cosine is not None:
        raise ToolError("--recipe reference and --target-cosine exclude each other", "omit one of them")
    if reference:
        ptq, reason = "direct", "ModelOpt would use one scale per output channel"
    elif args.ptq == "auto":
        ptq, reason = requirements_check.choose_ptq(graph_io.bytes_of(args.input))
    else:
        ptq, reason = args.ptq, "as requested"
    settings = QuantizationSettings(
        ptq, reference_recipe.HEADROOM if reference else args.headroom,
        args.weights, args.min_cosine, args.parity_rows, args.free_batch,
        target_cosine=args.target_cosine, max_fp16_products=args.max_fp16_products, recipe=args.recipe,
        rounding=_rounding(args), rollouts=args.rollouts, shaping=shaping.from_flags(args),
    )  # fmt: skip
    return settings, reason


def _rounding(args: argparse.Namespace) -> str:
    """Return the requested rounding; by default GPTQ if codes are stored and the recipe is this project's."""
    possible = args.weights == "fp8" and args.recipe == "ours"
    if args.rounding == "gptq" and not possible:
        excluded_by = "--weights fp16" if args.weights != "fp8" else "--recipe reference"
        raise ToolError(f"--rounding gptq requires stored codes; {excluded_by} has none", "omit one of them")
    return str(args.rounding or ("gptq" if possible else "nearest"))
