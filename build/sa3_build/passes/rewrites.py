"""The shape of a DiT graph: which of its parts are rewritten, and what each rewriting does on its own."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sa3_build.passes.bake_rope import BakeRope
from sa3_build.passes.base import Pass
from sa3_build.passes.pad_k import PadK
from sa3_build.passes.stack_attention import StackAttention


@dataclass(frozen=True)
class Shaping:
    """One switch a pass. All take an fp32 graph whose weights are direct, and leave alone what they do not know."""

    bake_rope: bool = True
    stack_attention: bool = True
    pad_k: bool = True

    def passes(self) -> list[Pass]:
        """The passes that are switched on, in the order in which they help one another."""
        all_passes: tuple[Pass, ...] = (BakeRope(), StackAttention(), PadK())
        return [one for one, field in zip(all_passes, fields(self), strict=True) if getattr(self, field.name)]
