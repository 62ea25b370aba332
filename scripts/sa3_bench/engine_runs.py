"""DiTs of this machine as contestants: any precision by any backend, from their own files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from sa3_bench.comparison import LEAST_COSINE, Contest, Step
from sa3_trt_core import engines, targets
from sa3_trt_core.engines.base import pick
from sa3_trt_core.errors import ToolError
from sa3_validation.models import ComparedModel, ModelPaths, find_model

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

AT = "@"  # between a precision and its backend


class Opened:
    """One engine; a step is a whole run of it, on tensors that lie on the device."""

    def __init__(self, engine: GraphEngine) -> None:
        self._engine = engine

    def prepare(self, inputs: dict[str, Tensor]) -> Step:
        return lambda: pick(self._engine.run(inputs), "velocity").float()


def find_engines(words: Sequence[str], place: ModelPaths) -> dict[str, ComparedModel]:
    """PRECISION@BACKEND each, by the word. Raises ToolError for one that is not known, named twice, or has no file."""
    found: dict[str, ComparedModel] = {}
    for word in words:
        precision, at, backend = word.partition(AT)
        if not at or precision not in targets.PRECISIONS or backend not in engines.CHOICES:
            raise ToolError(
                f"--engines: {word!r} is no PRECISION{AT}BACKEND",
                f"precisions: {', '.join(targets.PRECISIONS)}; backends: {', '.join(engines.CHOICES)}",
            )
        if word in found:
            raise ToolError(f"--engines: {word} stands there twice", "name each engine once")
        found[word] = find_model(precision, backend, place)
    if len(found) < 2:
        raise ToolError("--engines: one engine is compared with nothing", "name two or more, the reference first")
    return found


def contest_of(sides: dict[str, ComparedModel], stack: ExitStack) -> Contest:
    """Open every engine until `stack` ends: the first is what the others are compared with. Raises ToolError."""
    opened = {word: Opened(stack.enter_context(side.open())) for word, side in sides.items()}
    first, *others = opened
    least = LEAST_COSINE["fp8" if any(side.target.precision == "fp8" for side in sides.values()) else "fp16mixed"]

    def reference(inputs: dict[str, Tensor]) -> Tensor:
        return opened[first].prepare(inputs)().clone()

    return Contest(opened, dict.fromkeys(others, least), reference, first, first, None)
