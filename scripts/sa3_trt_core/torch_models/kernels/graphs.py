"""Run a function of tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sa3_trt_core.cuda_graph import capture


class Captured:
    """A function of named tensors, captured once as a CUDA graph; a call copies the inputs and replays the graph."""

    def __init__(self, function: Callable[..., Tensor], inputs: Mapping[str, Tensor], device: torch.device) -> None:
        self._inputs = {name: value.to(device, copy=True) for name, value in inputs.items()}
        self._graph, self._result = capture(lambda: function(**self._inputs))

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the result; the next call overwrites it."""
        for name, value in inputs.items():
            self._inputs[name].copy_(value, non_blocking=True)
        self._graph.replay()
        return self._result
