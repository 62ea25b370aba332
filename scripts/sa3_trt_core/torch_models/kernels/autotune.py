"""Choose a kernel's tile by measuring candidates on this machine's GPU; needs Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from triton.testing import do_bench_cudagraph

Tile = TypeVar("Tile")
BENCH_MILLISECONDS = 5  # repetitions of each candidate run this long


def fastest(candidates: Sequence[Tile], call_with: Callable[[Tile], Callable[[], Any]]) -> Tile | None:
    """Return the candidate with the fastest call; None if the GPU cannot run any.

    `call_with` returns the call to measure: the kernel with a candidate's tile.
    """
    milliseconds: dict[Tile, float] = {}
    for tile in candidates:
        call = call_with(tile)
        try:
            milliseconds[tile] = do_bench_cudagraph(call, rep=BENCH_MILLISECONDS)
        except Exception:  # out of shared memory or registers; the exception type depends on the compiler
            continue
    return min(milliseconds, key=milliseconds.__getitem__) if milliseconds else None
