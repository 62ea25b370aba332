"""A function of tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

Given = TypeVar("Given")

WARM_RUNS = 2  # a capture must meet kernels that are compiled and libraries that have chosen


def capture(
    function: Callable[[], Given], stream: torch.cuda.Stream | None = None, warm_runs: int = WARM_RUNS
) -> tuple[torch.cuda.CUDAGraph, Given]:
    """A CUDA graph of a function without arguments, and what the function gave: tensors that a replay fills.

    `stream` is where the function puts its work, where that is not the current one. Raises RuntimeError for work that
    cannot be captured.
    """
    import torch

    side = stream or torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_runs):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls belong to the capture: a ring decodes in another one.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        given = function()
    return graph, given
