"""CUDA streams of pipeline threads, and events that synchronize them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Lane:
    """One thread's CUDA stream; on a CPU every method is a no-op.

    To pass tensors to another lane, call `mark` in the lane that produced them, then `wait` and `hold` in the lane that
    uses them. Without `hold` the caching allocator could reuse their memory in the first lane while
    kernels of the second still read it.
    """

    def __init__(self, device: str, urgent: bool = False) -> None:
        """Create the stream; `urgent` gives it high priority."""
        self._stream: torch.cuda.Stream | None = None
        if device == "cuda":
            import torch

            torch.cuda.synchronize()  # makes earlier work of other streams visible to this one
            self._stream = torch.cuda.Stream(priority=-1 if urgent else 0)

    def active(self) -> AbstractContextManager[object]:
        """Return a context manager that makes this the thread's current stream."""
        if self._stream is None:
            return nullcontext()
        import torch

        return torch.cuda.stream(self._stream)

    def mark(self, timed: bool = False) -> torch.cuda.Event | None:
        """Record and return an event after all work queued so far; None on a CPU."""
        if self._stream is None:
            return None
        import torch

        event = torch.cuda.Event(enable_timing=timed)
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Make later work of this stream wait for an event of another lane, without blocking the thread."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of tensors allocated until this lane's queued work is done (`record_stream`)."""
        if self._stream is not None:
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)


class StepClock:
    """Measure steps on a stream with CUDA events, after `restart`; no-op on a CPU."""

    def __init__(self, lane: Lane) -> None:
        self._lane, self._recording = lane, False
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Record the start of a step."""
        self._begun = self._lane.mark(timed=True) if self._recording else None

    def end(self) -> None:
        """Record the end of the current step."""
        ended = None if self._begun is None else self._lane.mark(timed=True)
        if self._begun is not None and ended is not None:
            self._steps.append((self._begun, ended))

    def restart(self) -> None:
        """Discard recorded steps and start recording."""
        self._recording = True
        self._steps.clear()

    def busy_ms(self) -> float:
        """Return the total milliseconds of all steps. Synchronizes with the GPU."""
        self._synchronize()
        return sum(begun.elapsed_time(ended) for begun, ended in self._steps)

    def gaps_ms(self) -> list[float]:
        """Return the milliseconds between the end of each step and the start of the next. Synchronizes with the GPU."""
        self._synchronize()
        return [
            before.elapsed_time(after) for (_, before), (after, _) in zip(self._steps, self._steps[1:], strict=False)
        ]

    def _synchronize(self) -> None:
        if self._steps:
            self._steps[-1][1].synchronize()
