"""A CUDA stream for each thread of a pipeline, and the events by which one waits for another."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Lane:
    """One thread's CUDA stream. On a CPU every method does nothing: work there is done when its call returns.

    Tensors that another lane goes on with need three calls: `mark` in the lane that made them, then `wait` and `hold`
    in the lane that uses them. Without `hold` the caching allocator could reuse their memory in the first lane while
    kernels of the second still read it.
    """

    def __init__(self, device: str, urgent: bool = False) -> None:
        """`urgent`: kernels of this stream start before those of others that wait too."""
        self._stream: torch.cuda.Stream | None = None
        if device == "cuda":
            import torch

            torch.cuda.synchronize()  # what was queued on other streams before is visible to this one
            self._stream = torch.cuda.Stream(priority=-1 if urgent else 0)

    def active(self) -> AbstractContextManager[object]:
        """Return the context in which the calling thread's work goes to this stream."""
        if self._stream is None:
            return nullcontext()
        import torch

        return torch.cuda.stream(self._stream)

    def mark(self, timed: bool = False) -> torch.cuda.Event | None:
        """Return an event that is reached when everything queued so far is done; None on a CPU."""
        if self._stream is None:
            return None
        import torch

        event = torch.cuda.Event(enable_timing=timed)
        event.record(self._stream)
        return event

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Let what is queued from now on start after an event of another lane; the calling thread goes on."""
        if self._stream is not None and event is not None:
            self._stream.wait_event(event)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Keep the memory of these tensors until what this lane does with them is done."""
        if self._stream is not None:
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)


class StepClock:
    """Times of steps on a stream, by CUDA events, once `restart` was called; on a CPU nothing is recorded."""

    def __init__(self, lane: Lane) -> None:
        self._lane, self._recording = lane, False
        self._steps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Mark the begin of a step."""
        self._begun = self._lane.mark(timed=True) if self._recording else None

    def end(self) -> None:
        """Mark the end of the step that was begun last."""
        ended = None if self._begun is None else self._lane.mark(timed=True)
        if self._begun is not None and ended is not None:
            self._steps.append((self._begun, ended))

    def restart(self) -> None:
        """Record the steps from now on, and forget those so far."""
        self._recording = True
        self._steps.clear()

    def busy_ms(self) -> float:
        """Return the milliseconds from begin to end, of all steps together. Waits for the GPU."""
        self._synchronize()
        return sum(begun.elapsed_time(ended) for begun, ended in self._steps)

    def gaps_ms(self) -> list[float]:
        """Return the milliseconds between the end of each step and the begin of the next. Waits for the GPU."""
        self._synchronize()
        return [
            before.elapsed_time(after) for (_, before), (after, _) in zip(self._steps, self._steps[1:], strict=False)
        ]

    def _synchronize(self) -> None:
        if self._steps:
            self._steps[-1][1].synchronize()
