"""Capture a function of tensors as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Output = TypeVar("Output")

WARM_RUNS = 2  # runs before a capture, which compile kernels and let libraries select algorithms
_CAPTURING = threading.Lock()
_STREAMS: dict[int, torch.cuda.Stream] = {}


def capture(
    function: Callable[[], Output], stream: torch.cuda.Stream | None = None, warm_runs: int = WARM_RUNS
) -> tuple[torch.cuda.CUDAGraph, Output]:
    """Return a CUDA graph of a function without arguments, and its output tensors, which each replay overwrites.

    `stream` is the stream of the function's work (default: the current one). Raises RuntimeError for work that cannot
    be captured.
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
        # Capture only this thread's calls: a ring decodes in another thread.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = function()
    return graph, outputs


def _side_stream(device: int) -> torch.cuda.Stream:
    """Return the capture stream of a device, shared because cuBLAS keeps a workspace of 32 MB per stream."""
    import torch

    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
