"""A function of tensors as one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_CAPTURING = threading.Lock()
_STREAMS: dict[int, torch.cuda.Stream] = {}
WARM_RUNS = 2  # a capture must meet kernels that are compiled and libraries that have chosen


class Captured:
    """A function of named tensors, captured once; a call copies its inputs into place and replays it."""

    def __init__(self, function: Callable[..., Tensor], inputs: Mapping[str, Tensor], device: torch.device) -> None:
        self._inputs = {name: value.to(device, copy=True) for name, value in inputs.items()}
        self._graph, self._result = capture(lambda: function(**self._inputs))

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The result, which the next call overwrites."""
        for name, value in inputs.items():
            self._inputs[name].copy_(value, non_blocking=True)
        self._graph.replay()
        return self._result


def capture(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a function without arguments, and the tensor that a replay fills."""
    with _CAPTURING:
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls belong to the capture: a decoder may be at work in another one.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            result = function()
    return graph, result


def _side_stream(device: int) -> torch.cuda.Stream:
    """The one stream of a device that captures use: cuBLAS keeps a workspace of 32 MB for each stream it has met."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
