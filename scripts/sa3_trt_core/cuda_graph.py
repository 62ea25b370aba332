"""A function of tensors as one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Output = TypeVar("Output")

WARM_RUNS = 2  # a capture must meet kernels that are compiled and libraries that have chosen
_CAPTURING = threading.Lock()
_STREAMS: dict[int, torch.cuda.Stream] = {}


def capture(
    function: Callable[[], Output], stream: torch.cuda.Stream | None = None, warm_runs: int = WARM_RUNS
) -> tuple[torch.cuda.CUDAGraph, Output]:
    """Return a CUDA graph of a function without arguments, and what the function gave: tensors that a replay fills.

    `stream` is where the function puts its work, where that is not the current one. Raises RuntimeError for work that
    cannot be captured.
    """
    import torch

    with _CAPTURING:
        side = stream or _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warm_runs):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls belong to the capture: a ring decodes in another one.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = function()
    return graph, outputs


def _side_stream(device: int) -> torch.cuda.Stream:
    """The one stream of a device that captures use: cuBLAS keeps a workspace of 32 MB for each stream it has met."""
    import torch

    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
