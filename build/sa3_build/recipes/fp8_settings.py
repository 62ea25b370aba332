"""The settings of the FP8 recipe: what its result depends on besides the two inputs."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

from sa3_build.passes import shaping
from sa3_build.passes.shaping import Shaping
from sa3_trt_core.errors import ToolError

SHAPED = Shaping()
RULES = 4  # raised when the same settings come to mean other files: artefacts of older rules are stale


@dataclass(frozen=True)
class Settings:
    """What the result depends on besides its two inputs."""

    ptq: str  # "modelopt", or "direct": our own inserter, for machines without ModelOpt's memory
    headroom: float
    weights: str  # "fp8": stored as E4M3; "fp16": stored as they were, quantised when they are read
    min_cosine: float
    parity_rows: int
    free_batch: bool = True  # a batch axis that the source fixes at 1 becomes dynamic
    rules: int = RULES
    target_cosine: float | None = None  # the fewest products stay in 16 bits that reach it
    max_fp16_products: int | None = None
    recipe: str = "ours"  # "reference": the published recipe's choices, to compare with
    rounding: str = "gptq"  # of weights; "nearest": each to the nearest code
    shaping: Shaping = SHAPED  # what is rewritten in a source that was not by our own recipe
    rollouts: int = 2  # whole generations that the report compares, beside perturbed ones

    def noted(self) -> dict[str, Any]:
        """As manifest and report hold them: a setting younger than an artefact is left out while it changes nothing."""
        young = ("target_cosine", "max_fp16_products", "recipe", "rounding", "rollouts", "shaping")
        same = {field.name for field in fields(self) if getattr(self, field.name) == field.default}
        return {name: value for name, value in asdict(self).items() if name not in young or name not in same}


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
