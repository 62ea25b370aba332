"""Requests of a live ring: a ticket from submission to sound, and the reasons to refuse one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sa3_trt_core.errors import ToolError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sa3_trt_core.batch import Batch
    from sa3_trt_core.request import Request
    from sa3_trt_core.result import Result
    from sa3_trt_core.sampling.ring import RingRow

OnWindow = Callable[["Tensor"], None]


class QueueFullError(ToolError):
    """A request that is refused because `max_waiting` others wait; `retry_seconds` is when a place is likely free."""

    def __init__(self, waiting: int, retry_seconds: float) -> None:
        super().__init__(f"{waiting} requests wait already", f"try again in {retry_seconds:.0f} s")
        self.retry_seconds = retry_seconds


class ClosedError(ToolError):
    """Raised for a request that is refused or cancelled because the ring is closing."""

    def __init__(self) -> None:
        super().__init__("no more requests are taken: this process is ending", "try again elsewhere, or later")


@dataclass(frozen=True)
class Occupancy:
    """Requests that wait for a place, that are in the ring, and that are decoded or wait for it."""

    waiting: int
    ring: int
    decoding: int


@dataclass(eq=False)
class Ticket:
    """One request on its way; `window` latent frames are decoded at a time where `on_window` takes the samples."""

    request: Request
    window: int
    on_window: OnWindow | None
    future: Future[Result] = field(default_factory=Future)
    job: Batch | None = None
    row: RingRow | None = None
    prepared: torch.cuda.Event | None = None  # on a GPU: its conditioning and noise are there
    sampled: torch.cuda.Event | None = None  # its latents are there
    admitted: float = 0.0


def settle(future: Future[Result], outcome: Any) -> None:
    """Give a future its result or its error, unless it was cancelled or has one."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
