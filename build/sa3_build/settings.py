"""The settings of the FP8 recipe: what its result depends on besides the two inputs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

RULES = 2  # raised when the same settings come to mean other files: artefacts of older rules are stale


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

    def noted(self) -> dict[str, Any]:
        """As manifest and report hold them: a setting younger than an artefact is left out while it changes nothing."""
        young = ("target_cosine", "max_fp16_products", "recipe")
        same = {field.name for field in fields(self) if getattr(self, field.name) == field.default}
        return {name: value for name, value in asdict(self).items() if name not in young or name not in same}
