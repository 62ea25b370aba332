"""The settings of an FP8 build."""

from __future__ import annotations

from dataclasses import dataclass

from sa3_build.passes.shaping import Shaping

RULES = 5  # raised when the same settings come to mean other files: artefacts of older rules are stale


SHAPED = Shaping()


@dataclass(frozen=True)
class Settings:
    """Options that the result depends on besides its two input files."""

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
    shaping: Shaping = SHAPED  # what is rewritten in a source that was not made by our own recipe
    rollouts: int = 2  # whole generations that the report compares, beside perturbed ones
