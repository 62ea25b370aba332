"""Tickets of a live ring's requests, and the errors of refused ones."""

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
    """Raised when `max_waiting` requests wait already; `retry_seconds` is the expected time until a slot is free."""

    def __init__(self, waiting: int, retry_seconds: float) -> None:
        super().__init__(f"{waiting} requests wait already", f"try again in {retry_seconds:.0f} s")
        self.retry_seconds = retry_seconds


class ClosedError(ToolError):
    """Raised for a request that is refused or cancelled because the ring is closing."""

    def __init__(self) -> None:
        super().__init__("the ring is shutting down and accepts no requests", "retry later, or on another server")


@dataclass(frozen=True)
class Occupancy:
    """Number of requests waiting for a slot, in the ring, and decoding or waiting for the decoder."""

    waiting: int
    ring: int
    decoding: int


@dataclass(eq=False)
class Ticket:
    """State of one request. With `on_window` it is decoded `window` latent frames at a time."""

    request: Request
    window: int
    on_window: OnWindow | None
    future: Future[Result] = field(default_factory=Future)
    job: Batch | None = None
    row: RingRow | None = None
    prepared: torch.cuda.Event | None = None  # GPU: conditioning and noise are uploaded
    sampled: torch.cuda.Event | None = None  # GPU: latents are sampled
    admitted: float = 0.0


def settle(future: Future[Result], outcome: Any) -> None:
    """Set the result or exception of a future, unless it is cancelled or done."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
