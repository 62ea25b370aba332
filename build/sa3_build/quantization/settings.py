"""QuantizationSettings of an FP8 build."""

from __future__ import annotations

from dataclasses import dataclass

from sa3_build.passes.shaping import Shaping

RULES = 5  # incremented when equal settings produce other files; artefacts of older rules are stale


SHAPED = Shaping()


@dataclass(frozen=True)
class QuantizationSettings:
    """Options that the result depends on, besides its two input files."""

    ptq: str  # "modelopt", or "direct": this project's pass, which needs less memory
    headroom: float
    weights: str  # "fp8": stored as E4M3 codes; "fp16": stored in fp16 and quantised at run time
    min_cosine: float
    parity_rows: int
    free_batch: bool = True  # make a batch axis that is fixed at 1 dynamic
    rules: int = RULES
    target_cosine: float | None = None  # leave the fewest layers in 16 bits that reach it
    max_fp16_products: int | None = None
    recipe: str = "ours"  # "reference": the published recipe's choices, for comparison
    rounding: str = "gptq"  # rounding of weights: "gptq", or "nearest" code
    shaping: Shaping = SHAPED  # rewrites of a source of another recipe
    rollouts: int = 2  # full generations that the report compares, besides perturbed ones
