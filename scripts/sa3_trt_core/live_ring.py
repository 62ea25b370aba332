"""A ring that takes requests while it runs: made ready, advanced and decoded in three threads of its own."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from sa3_trt_core.audio import autoencoder
from sa3_trt_core.engines.base import Closing
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampling.inputs import sigmas_of
from sa3_trt_core.sampling.ring import Ring, RingRow
from sa3_trt_core.shapes import MAX_BATCH

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.batch import Batch
    from sa3_trt_core.pipeline import Generator, Result
    from sa3_trt_core.request import Request

READY = 2  # requests whose text is encoded before a place is free: more would only hold memory
REMEMBERED_SECONDS = 32  # sounds whose time in the ring is averaged

OnWindow = Callable[["Tensor"], None]


class QueueFullError(ToolError):
    """A request that is refused because `most_waiting` others wait; `retry_seconds` is when a place is likely free."""

    def __init__(self, waiting: int, retry_seconds: float) -> None:
        super().__init__(f"{waiting} requests wait already", f"try again in {retry_seconds:.0f} s")
        self.retry_seconds = retry_seconds


class ClosedError(ToolError):
    """A request that is refused, or given up, because the ring is closing."""

    def __init__(self) -> None:
        super().__init__("no more requests are taken: this process is ending", "try again elsewhere, or later")


@dataclass(frozen=True)
class Occupancy:
    """Requests that wait for a place, that are in the ring, and that are decoded or wait for it."""

    waiting: int
    ring: int
    decoding: int


@dataclass(eq=False)
class _Ticket:
    """One request on its way; `window` latent frames are decoded at a time where `on_window` takes the samples."""

    request: Request
    window: int
    on_window: OnWindow | None
    future: Future[Result] = field(default_factory=Future)
    job: Batch | None = None
    row: RingRow | None = None
    admitted: float = 0.0


class LiveRing(Closing):
    """Sounds of requests that come at any time: each enters the ring at the next step at which a place is free.

    A generator's engines are used by one thread each. Nothing of a request is kept after its future is done. Cancelling
    the future takes the request out: of the queue at once, of the ring before the next step. `submit` and `occupancy`
    may be called from any thread. Does not close the generator.
    """

    def __init__(self, generator: Generator, depth: int, most_waiting: int = 64) -> None:
        """Start the threads. Raises ToolError for a generator that frees its models."""
        self._generator = generator
        velocity = generator.ring_velocity()
        most_rows = min(MAX_BATCH, velocity.max_batch or MAX_BATCH)
        self._ring = Ring(velocity, depth, most_rows=most_rows, alone=_rows_alone(generator))
        self.depth, self.most_waiting = depth, most_waiting
        self.steps = 0  # forwards of the whole ring so far
        self.failure: BaseException | None = None  # what ended a thread: nothing is made any more
        self._changed = threading.Condition()
        self._waiting: deque[_Ticket] = deque()
        self._ready: deque[_Ticket] = deque()
        self._inside: dict[_Ticket, None] = {}
        self._finished: deque[_Ticket] = deque()
        self._busy: set[_Ticket] = set()  # being made ready, or decoded, right now
        self._times: deque[float] = deque(maxlen=REMEMBERED_SECONDS)
        self._refusing = self._stopping = False
        work: list[Callable[[], bool]] = [self._prepare_one, self._step, self._decode_one]
        self._threads = [
            threading.Thread(target=self._repeat, args=(one,), name=f"sa3-ring{one.__name__}", daemon=True)
            for one in work
        ]
        for thread in self._threads:
            thread.start()

    @property
    def occupancy(self) -> Occupancy:
        """How many requests stand where."""
        with self._changed:
            decoding = len(self._finished) + sum(ticket.job is not None for ticket in self._busy)
            preparing = sum(ticket.job is None for ticket in self._busy)
            return Occupancy(len(self._waiting) + preparing + len(self._ready), len(self._inside), decoding)

    @property
    def retry_seconds(self) -> float:
        """Seconds after which one more place is likely free, at least 1."""
        with self._changed:
            mean = sum(self._times) / len(self._times) if self._times else 0.0
        return max(1.0, mean / self.depth)

    def submit(self, request: Request, on_window: OnWindow | None = None, window: int = 0) -> Future[Result]:
        """Queue a request and return the future of its sound.

        `on_window(samples)` is called by the decoder's thread with fp32 samples (n, 2) as they are decoded, `window`
        latent frames at a time. Raises QueueFullError or ClosedError.
        """
        ticket = _Ticket(request, window, on_window)
        with self._changed:
            if self._refusing or self.failure is not None:
                raise ClosedError
            full = len(self._waiting) >= self.most_waiting
            if not full:
                self._waiting.append(ticket)
                self._changed.notify_all()
        if full:
            raise QueueFullError(self.most_waiting, self.retry_seconds)
        ticket.future.add_done_callback(self._wake)
        return ticket.future

    def drain(self, seconds: float) -> bool:
        """Take no more requests and finish those that were taken; return False when `seconds` were not enough."""
        with self._changed:
            self._refusing = True
            return self._changed.wait_for(lambda: self.failure is not None or not self._tickets(), seconds)

    def close(self) -> None:
        """Stop after the work in hand; what was not finished gets a ClosedError."""
        with self._changed:
            self._refusing = self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._give_up(ClosedError())

    def _tickets(self) -> list[_Ticket]:
        return [*self._waiting, *self._ready, *self._inside, *self._finished, *self._busy]

    def _wake(self, future: Future[Result]) -> None:
        if future.cancelled():
            with self._changed:
                self._waiting = deque(ticket for ticket in self._waiting if not ticket.future.cancelled())
                self._changed.notify_all()

    def _give_up(self, error: BaseException) -> None:
        with self._changed:
            tickets = self._tickets()
        for ticket in tickets:
            _settle(ticket.future, error)

    def _repeat(self, one: Callable[[], bool]) -> None:
        """Do one piece of work after the other; a fault of ours ends everything and is what the requests get."""
        try:
            while one():
                pass
        except BaseException as error:
            self.failure = error
            self._give_up(error)
            with self._changed:
                self._changed.notify_all()

    def _prepare_one(self) -> bool:
        """Encode the text and the init audio of the next request, and draw its noise."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or (self._waiting and len(self._ready) < READY))
            if self._stopping:
                return False
            ticket = self._waiting.popleft()
            self._busy.add(ticket)
        job, row, error = None, None, None
        try:
            if not ticket.future.cancelled():
                job, row = self._generator.ring_batch(ticket.request)
        except Exception as caught:
            error = caught
        with self._changed:
            self._busy.discard(ticket)
            ticket.job, ticket.row = job, row
            if row is not None:
                self._ready.append(ticket)
            self._changed.notify_all()
        if error is not None:
            _settle(ticket.future, error)
        return True

    def _step(self) -> bool:
        """Let those that are ready in, those that were cancelled out, and advance the ring once."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._inside or (self._ready and self._decoder_keeps_up()))
            if self._stopping:
                return False
            for ticket in [ticket for ticket in self._inside if ticket.future.cancelled()]:
                self._ring.remove(ticket)
                del self._inside[ticket]
            while self._ready and len(self._ring) < self.depth and self._decoder_keeps_up():
                ticket = self._ready.popleft()
                if ticket.row is not None and not ticket.future.cancelled():
                    ticket.admitted = time.perf_counter()
                    self._ring.admit(ticket, ticket.row)
                    self._inside[ticket] = None
            self._changed.notify_all()
        if not self._ring:
            return True
        left = [(cast(_Ticket, key), outcome) for key, outcome in self._ring.step()]
        with self._changed:
            self.steps += 1
            for ticket, outcome in left:
                del self._inside[ticket]
                ticket.row = None
                if isinstance(outcome, Exception):
                    continue
                self._times.append(time.perf_counter() - ticket.admitted)
                assert ticket.job is not None
                ticket.job.latents = outcome
                self._finished.append(ticket)
            self._changed.notify_all()
        for ticket, outcome in left:
            if isinstance(outcome, Exception):
                _settle(ticket.future, outcome)
        return True

    def _decoder_keeps_up(self) -> bool:
        """Whether fewer sounds wait for the decoder than a ring holds: their latents would pile up otherwise."""
        return len(self._finished) < self.depth

    def _decode_one(self) -> bool:
        """Decode what left the ring first."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._finished)
            if self._stopping:
                return False
            ticket = self._finished.popleft()
            self._busy.add(ticket)
            self._changed.notify_all()
        outcome: Any = None
        try:
            if not ticket.future.cancelled():
                outcome = _decoded(self._generator, ticket)
        except Exception as caught:
            outcome = caught
        if outcome is not None:
            _settle(ticket.future, outcome)
        with self._changed:
            self._busy.discard(ticket)
            self._changed.notify_all()
        return True


def _rows_alone(generator: Generator) -> bool:
    """Whether every request gets a forward of its own: larger batches gain nothing on a CPU."""
    return generator.engines.devices.get("dit") == "cpu"


def _decoded(generator: Generator, ticket: _Ticket) -> Result:
    """The sound of a ticket whose latents are there; its `on_window` gets the samples as they are decoded."""
    import torch

    from sa3_trt_core.result import Result

    job = ticket.job
    assert job is not None and job.latents is not None
    if ticket.on_window is None:
        return generator.decoded(job)
    parts = []
    with torch.inference_mode(), job.meter.stage("decode"):
        decoder, seconds = generator.engines.engine("decoder"), ticket.request.seconds
        for part in autoencoder.decode_windows(decoder, job.latents.cpu(), seconds, ticket.window):
            if ticket.future.cancelled():
                raise CancelledError
            ticket.on_window(part)
            parts.append(part)
    timings = dict(job.meter.timings)
    return Result(job.latents, sigmas_of(ticket.request), torch.cat(parts), timings, dict(job.meter.memory))


def _settle(future: Future[Result], outcome: Any) -> None:
    """Give a future its result or its error, unless it was cancelled or has one."""
    if future.done() or not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
