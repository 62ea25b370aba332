"""Open this machine's DiT engines as contestants, in any precision and backend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from sa3_bench.comparison import MIN_COSINE, Contest, Step
from sa3_trt_core import engines, targets
from sa3_trt_core.engines.base import require_output
from sa3_trt_core.errors import ToolError
from sa3_validation.models import ComparedModel, ModelPaths, find_model

if TYPE_CHECKING:
    from sa3_trt_core.engines.base import GraphEngine

AT = "@"  # between a precision and its backend


class Opened:
    """One engine; a step is a complete run on tensors of the device."""

    def __init__(self, engine: GraphEngine) -> None:
        self._engine = engine

    def prepare(self, inputs: dict[str, Tensor]) -> Step:
        return lambda: require_output(self._engine.run(inputs), "velocity").float()


def find_engines(names: Sequence[str], paths: ModelPaths) -> dict[str, ComparedModel]:
    """Return models by name PRECISION@BACKEND. Raises ToolError for an unknown, repeated or missing one."""
    models: dict[str, ComparedModel] = {}
    for name in names:
        precision, at, backend = name.partition(AT)
        if not at or precision not in targets.PRECISIONS or backend not in engines.CHOICES:
            raise ToolError(
                f"--engines: {name!r} is not PRECISION{AT}BACKEND",
                f"precisions: {', '.join(targets.PRECISIONS)}; backends: {', '.join(engines.CHOICES)}",
            )
        if name in models:
            raise ToolError(f"--engines: {name} is repeated", "name each engine once")
        models[name] = find_model(precision, backend, paths)
    if len(models) < 2:
        raise ToolError("--engines: a comparison requires two engines", "name two or more, the reference first")
    return models


def contest_of(models: dict[str, ComparedModel], stack: ExitStack) -> Contest:
    """Open every engine until `stack` ends; the first is the reference of the others. Raises ToolError."""
    opened = {name: Opened(stack.enter_context(model.open())) for name, model in models.items()}
    first, *others = opened
    min_cosine = MIN_COSINE["fp8" if any(model.target.precision == "fp8" for model in models.values()) else "fp16mixed"]

    def reference(inputs: dict[str, Tensor]) -> Tensor:
        return opened[first].prepare(inputs)().clone()

    return Contest(opened, dict.fromkeys(others, min_cosine), reference, first, first, None)
