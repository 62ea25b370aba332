"""Does a DiT tell apart two noise levels, or two durations, that 16 bits hold to be one?

Fourier features of t and of the duration reach 62,832 rad: computed in fp16 they are wrong by radians, and yet the
error of FP8 products can hide that in every comparison with a reference. Two values that round to one fp16 number show
it all the same: an island in fp32 answers them differently, one in fp16 with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_validation import rollouts
from sa3_validation.cases import Row
from sa3_validation.distances import relative

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

PROBES = ("t", "seconds")
SIGMAS = (0.9579, 0.7455, 0.5125)  # none at a power of two, where the spacing changes
LONGEST = 384.0  # seconds: what durations are divided by
APART = 2.0**-20  # of the value: some steps of fp32, a 500th of one of fp16, so that no angle is rounded otherwise


def probes(row: Row) -> dict[str, list[tuple[Row, Row]]]:
    """Pairs of rows by what they differ in: each pair is one row to 16 bits."""
    import torch

    def of_t(t: float) -> Row:
        return replace(row, t=torch.tensor([t], dtype=torch.float32))

    def of_seconds(share: float) -> Row:
        seconds = torch.tensor([share * LONGEST], dtype=torch.float32)
        return replace(of_t(SIGMAS[0]), cond=replace(row.cond, seconds_total=seconds))

    shares = [float(row.cond.seconds_total[0]) / LONGEST * factor for factor in (0.9, 1.0, 1.1)]
    return {"t": [_pair(of_t, t) for t in SIGMAS], "seconds": [_pair(of_seconds, share) for share in shares]}


def answers(engine: GraphEngine, row: Row) -> dict[str, list[float]]:
    """Of every pair: the relative L2 between the two velocities; 0 where the DiT takes them for one."""
    return {
        name: [relative(*(rollouts.step(engine, one).astype(np.float64) for one in pair)) for pair in pairs]
        for name, pairs in probes(row).items()
    }


def document(
    found: Mapping[str, Mapping[str, Sequence[float]]], spreads: Callable[[list[float]], Any]
) -> dict[str, Any]:
    """By probe: how far the reference and the candidate answer apart, and the candidate's share of the reference's."""
    return {
        name: {
            **{side: list(answered[name]) for side, answered in found.items()},
            "share": spreads(
                [
                    other / truth if truth else float("nan")
                    for truth, other in zip(found["reference"][name], found["candidate"][name], strict=True)
                ]
            ),
        }
        for name in PROBES
    }


def _pair(row_of: Callable[[float], Row], value: float) -> tuple[Row, Row]:
    """The fp16 number nearest to a value, and a value just above it, which rounds to the same."""
    near = float(np.float16(value))
    return row_of(near), row_of(near * (1.0 + APART))
