"""The rewrites of a DiT graph, in their order of application."""

from __future__ import annotations

from dataclasses import fields

from sa3_build.passes.bake_rope import BakeRope
from sa3_build.passes.base import Pass
from sa3_build.passes.null_row import AddNullRow
from sa3_build.passes.pad_k import PadK
from sa3_build.passes.shaping import Shaping
from sa3_build.passes.stack_attention import StackAttention


def passes_of(shaping: Shaping) -> list[Pass]:
    """Return the enabled rewrites. All take an fp32 graph with direct weights."""
    all_passes: tuple[Pass, ...] = (AddNullRow(), BakeRope(), StackAttention(), PadK())
    return [rewrite for rewrite, field in zip(all_passes, fields(shaping), strict=True) if getattr(shaping, field.name)]
