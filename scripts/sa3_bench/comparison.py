"""Contestants of a benchmark on the same inputs, with the references of their outputs and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sa3_trt_core.torch_models.dit.weights import Sizes

Step = Callable[[], Tensor]
MIN_COSINE = {"fp8": 0.98, "fp16mixed": 0.9999}  # velocity, by precision: a check, not a quality figure


class Contestant(Protocol):
    """A DiT: `prepare` returns a step on inputs on the device; its velocity is valid until the next one."""

    def prepare(self, inputs: dict[str, Tensor]) -> Step: ...


@dataclass(frozen=True)
class Contest:
    """Contestants by name, with their reference and peers.

    `judged` maps a name to the least cosine of its velocity with `reference(inputs)` and of a row with itself alone;
    the others are the peers of its time. `sizes` are None where unknown, and then there is no floor; otherwise a
    judged contestant is named by its precision.
    """

    contestants: Mapping[str, Contestant]
    judged: Mapping[str, float]
    reference: Callable[[dict[str, Tensor]], Tensor]
    reference_name: str
    peers_name: str
    sizes: Sizes | None
