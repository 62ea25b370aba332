"""Benchmark specification: the contestants, the reference for correctness and the baseline for speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sa3_trt_core.torch_models.dit.weights import Sizes

Step = Callable[[], Tensor]
# Of the velocity, by precision: detects wrong results, does not measure quality.
MIN_COSINE = {"fp8": 0.98, "fp16mixed": 0.9999}


class Contestant(Protocol):
    """A DiT: `prepare` returns a step on inputs on the device; its velocity is valid until the next one."""

    def prepare(self, inputs: dict[str, Tensor]) -> Step: ...


@dataclass(frozen=True)
class Contest:
    """Contestants by name, the reference for correctness and the peers for speed.

    `judged` maps the name of a checked contestant to a minimum cosine: of its velocity with `reference(inputs)`, and of
    each row of a batch with the same row run alone. Its time is compared with that of the other contestants. With
    `sizes`, the name of a checked contestant is its precision; without `sizes` there is no roofline.
    """

    contestants: Mapping[str, Contestant]
    judged: Mapping[str, float]
    reference: Callable[[dict[str, Tensor]], Tensor]
    reference_name: str
    peers_name: str
    sizes: Sizes | None
