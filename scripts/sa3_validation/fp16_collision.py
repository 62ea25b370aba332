"""Test that a DiT separates two sigmas, or two durations, that round to the same fp16 number.

Fourier features of t and of the duration reach 62,832 rad: computed in fp16 they are wrong by radians, and yet the
error of FP8 linears can hide that in every comparison with a reference. Two values that round to one fp16 number reveal
it: an fp32 island gives different velocities, an fp16 one gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sa3_validation import rollouts
from sa3_validation.cases import StepInput
from sa3_validation.distances import relative

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

PROBES = ("t", "seconds")
DITS = ("reference", "candidate")
SIGMAS = (0.9579, 0.7455, 0.5125)  # away from powers of two, where the spacing of fp16 changes
DURATION_SCALE = 384.0  # seconds: the DiT divides durations by it
RELATIVE_GAP = 2.0**-20  # several fp32 steps and 1/500 of an fp16 step, so that all angles round alike


def probes(row: StepInput) -> dict[str, list[tuple[StepInput, StepInput]]]:
    """Return pairs of rows that differ in t or in the duration by less than an fp16 step, by the name of that input."""
    import torch

    def of_t(t: float) -> StepInput:
        return replace(row, t=torch.tensor([t], dtype=torch.float32))

    def of_seconds(share: float) -> StepInput:
        seconds = torch.tensor([share * DURATION_SCALE], dtype=torch.float32)
        return replace(of_t(SIGMAS[0]), cond=replace(row.cond, seconds_total=seconds))

    shares = [float(row.cond.seconds_total[0]) / DURATION_SCALE * factor for factor in (0.9, 1.0, 1.1)]
    return {"t": [_pair(of_t, t) for t in SIGMAS], "seconds": [_pair(of_seconds, share) for share in shares]}


def velocity_differences(engine: GraphEngine, row: StepInput) -> dict[str, list[float]]:
    """Return the relative L2 between the two velocities of every pair; 0 when the DiT cannot separate them."""
    return {
        name: [relative(*(rollouts.step(engine, row).astype(np.float64) for row in pair)) for pair in pairs]
        for name, pairs in probes(row).items()
    }


def document(
    differences: Mapping[str, Mapping[str, Sequence[float]]], spreads: Callable[[list[float]], Any]
) -> dict[str, Any]:
    """Return, by probe, the differences of reference and candidate and the candidate's share of the reference's."""
    return {
        name: {
            **{dit: list(by_probe[name]) for dit, by_probe in differences.items()},
            "share": spreads(
                [
                    candidate / reference if reference else float("nan")
                    for reference, candidate in zip(
                        differences["reference"][name], differences["candidate"][name], strict=True
                    )
                ]
            ),
        }
        for name in PROBES
    }


def _pair(row_of: Callable[[float], StepInput], value: float) -> tuple[StepInput, StepInput]:
    """Return rows of the fp16 number nearest to `value` and of a value just above it that rounds to the same number."""
    near = float(np.float16(value))
    return row_of(near), row_of(near * (1.0 + RELATIVE_GAP))
