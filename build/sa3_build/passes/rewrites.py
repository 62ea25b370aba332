"""The rewritings of a DiT graph, in the order in which they help one another."""

from __future__ import annotations

from dataclasses import fields

from sa3_build.passes.bake_rope import BakeRope
from sa3_build.passes.base import Pass
from sa3_build.passes.null_row import AddNullRow
from sa3_build.passes.pad_k import PadK
from sa3_build.passes.shaping import Shaping
from sa3_build.passes.stack_attention import StackAttention


def passes_of(shaping: Shaping) -> list[Pass]:
    """The passes that are switched on. All take an fp32 graph whose weights are direct."""
    all_passes: tuple[Pass, ...] = (AddNullRow(), BakeRope(), StackAttention(), PadK())
    return [one for one, field in zip(all_passes, fields(shaping), strict=True) if getattr(shaping, field.name)]
