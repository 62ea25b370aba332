"""What a benchmark compares: contestants on the same inputs, what they are right against and fast against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sa3_trt_core.torch_models.dit.weights import Sizes

Step = Callable[[], Tensor]
LEAST_COSINE = {"fp8": 0.98, "fp16mixed": 0.9999}  # velocity, by precision: a check, not a quality figure


class Contestant(Protocol):
    """A DiT: `prepare` gives a step on inputs that lie on the device; its velocity is valid until the next one."""

    def prepare(self, inputs: dict[str, Tensor]) -> Step: ...


@dataclass(frozen=True)
class Contest:
    """Contestants by name, and who is measured against whom.

    `judged` maps a name to the least cosine of its velocity with `reference(inputs)` and of a row with itself alone;
    the others are the peers that a judged one's time is compared with. `sizes` are None where they are not known, and
    then no floor is given; where they are, a judged one is called by its precision.
    """

    contestants: Mapping[str, Contestant]
    judged: Mapping[str, float]
    reference: Callable[[dict[str, Tensor]], Tensor]
    reference_name: str
    peers_name: str
    sizes: Sizes | None
