"""Adapted weights from base weights: the formulas of the native trainer, in fp32.

W is the base weight (out, in), s the strength, k = alpha / rank, d = B A, or U M V^T in the -xs kinds.

    lora       W + k s d
    dora-rows  V = W + k s d;  m[:, None] * V / |V| a row
    dora-cols  the same by columns
    bora       H = mr[:, None] * V / |V| a row;  mc[None, :] * H / |H| a column

Magnitudes may be negative and are used with their sign. 1e-12 is added to each norm. s = 0 returns W itself.
Source: the model's own loader (models/lora/model.py of stable-audio-3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.lora.kinds import Kind

EPSILON = 1e-12
Rule = Literal["native", "fade"]
RULES: tuple[Rule, ...] = ("native", "fade")
Stacking = Literal["chained", "summed"]
STACKINGS: tuple[Stacking, ...] = ("chained", "summed")


def adapted(
    weight: Tensor, factors: Mapping[str, Tensor], kind: Kind, scale: float, strength: float, rule: Rule,
    bases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the adapted weight (out, in) fp32 of `weight` (out, in), on its device.

    `scale` is k. `bases` are U (out, r) and V (in, r) of the -xs kinds. `rule` "native" scales the low-rank change
    alone, so that a magnitude acts in full at every strength but 0; "fade" is W + s (W(1) - W), continuous at 0. They
    differ for the kinds with magnitudes, at strengths other than 0 and 1.
    """
    wide = weight.float()
    if strength == 0.0:
        return wide
    if rule == "fade" and (kind.rows or kind.columns):
        return wide + strength * (_full(wide, factors, kind, scale, bases) - wide)
    return _full(wide, factors, kind, scale * strength, bases)


def change(factors: Mapping[str, Tensor], bases: tuple[Tensor, Tensor] | None, like: Tensor) -> Tensor:
    """Return d (out, in) fp32 on the device of `like`: B A, or U M V^T."""

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(like.device).float()

    if bases is None:
        return wide(factors["lora_B"]) @ wide(factors["lora_A"])
    left, right = (wide(side) for side in bases)
    return left @ wide(factors["M_xs"]) @ right.T


def _full(
    weight: Tensor, factors: Mapping[str, Tensor], kind: Kind, scale: float, bases: tuple[Tensor, Tensor] | None
) -> Tensor:
    changed = change(factors, bases, weight).mul_(scale).add_(weight)
    if kind.rows:
        magnitude = factors["magnitude_r" if kind.columns else "magnitude"].to(changed.device).float()
        changed = changed * (magnitude / (changed.norm(dim=1) + EPSILON))[:, None]
    if kind.columns:
        magnitude = factors["magnitude_c" if kind.rows else "magnitude"].to(changed.device).float()
        changed = changed * (magnitude / (changed.norm(dim=0) + EPSILON))[None, :]
    return changed
