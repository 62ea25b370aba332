"""Continuous batching: requests enter at the next step; three threads encode, sample and decode.

On a GPU each thread has a CUDA stream. The sampling thread queues a step while the previous one runs and waits for no
copy or check: the encoding thread uploads conditioning and noise, the decoding thread checks latents.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, cast

from sa3_trt_core.engines.base import Closeable
from sa3_trt_core.ring_decoding import decode_tickets
from sa3_trt_core.ring_requests import ClosedError, Occupancy, OnWindow, QueueFullError, Ticket, settle
from sa3_trt_core.sampling.ring import Ring
from sa3_trt_core.shapes import MAX_BATCH
from sa3_trt_core.streams import Lane, StepClock

if TYPE_CHECKING:
    import torch

    from sa3_trt_core.pipeline import Generator, Result
    from sa3_trt_core.request import Request

MAX_READY = 2  # requests encoded ahead of a free slot: more would only use memory
AVERAGED_SOUNDS = 32  # latest sounds whose mean time in the ring gives `retry_seconds`


class LiveRing(Closeable):
    """Continuous batching of requests that arrive at any time: each enters the ring at the next step with a free slot.

    Each engine of the generator is used by one thread. No data of a request outlives its future. Cancelling the future
    removes the request from the queue at once, and from the ring before the next step. `submit` and `occupancy` are
    thread-safe. Does not close the generator.
    """

    def __init__(self, generator: Generator, depth: int, max_waiting: int = 64) -> None:
        """Start the threads. Raises ToolError for a generator with `free_models`."""
        self._generator = generator
        velocity = generator.ring_velocity()
        max_batch = min(MAX_BATCH, velocity.max_batch or MAX_BATCH)
        self._ring = Ring(velocity, depth, max_batch=max_batch, alone=_rows_alone(generator))
        self.depth, self.max_waiting = depth, max_waiting
        self.steps = 0  # forwards of the whole ring so far
        self.failure: BaseException | None = None  # exception that ended a thread; the ring then makes no more sounds
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._ready: deque[Ticket] = deque()
        self._inside: dict[Ticket, None] = {}
        self._finished: deque[Ticket] = deque()
        self._busy: set[Ticket] = set()  # being encoded or decoded
        self._times: deque[float] = deque(maxlen=AVERAGED_SOUNDS)
        self._refusing = self._stopping = False
        self._text_lane, self._dit_lane = Lane(velocity.device), Lane(velocity.device)
        self._decoder_lane = Lane(velocity.device, urgent=True)  # decoding frees slots, so it comes before sampling
        self._last_step: torch.cuda.Event | None = None
        self.clock = StepClock(self._dit_lane)
        work = (
            (self._prepare_one, self._text_lane), (self._step, self._dit_lane), (self._decode_some, self._decoder_lane)
        )  # fmt: skip
        self._threads = [
            threading.Thread(target=self._repeat, args=(one, lane), name=f"sa3-ring{one.__name__}", daemon=True)
            for one, lane in work
        ]
        for thread in self._threads:
            thread.start()

    @property
    def occupancy(self) -> Occupancy:
        """Number of requests by stage."""
        with self._changed:
            decoding = len(self._finished) + sum(ticket.job is not None for ticket in self._busy)
            preparing = sum(ticket.job is None for ticket in self._busy)
            return Occupancy(len(self._waiting) + preparing + len(self._ready), len(self._inside), decoding)

    @property
    def retry_seconds(self) -> float:
        """Expected seconds until a slot is free, at least 1."""
        with self._changed:
            mean = sum(self._times) / len(self._times) if self._times else 0.0
        return max(1.0, mean / self.depth)

    def submit(self, request: Request, on_window: OnWindow | None = None, window: int = 0) -> Future[Result]:
        """Queue a request and return the future of its result.

        `on_window(samples)` is called by the decoder's thread with fp32 samples (n, 2) as they are decoded, `window`
        latent frames at a time. Raises QueueFullError or ClosedError.
        """
        ticket = Ticket(request, window, on_window)
        with self._changed:
            if self._refusing or self.failure is not None:
                raise ClosedError
            full = len(self._waiting) >= self.max_waiting
            if not full:
                self._waiting.append(ticket)
                self._changed.notify_all()
        if full:
            raise QueueFullError(self.max_waiting, self.retry_seconds)
        ticket.future.add_done_callback(self._wake)
        return ticket.future

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and finish the accepted ones; return False on timeout after `seconds`."""
        with self._changed:
            self._refusing = True
            return self._changed.wait_for(lambda: self.failure is not None or not self._tickets(), seconds)

    def close(self) -> None:
        """Stop the threads after their current work; unfinished requests raise ClosedError."""
        with self._changed:
            self._refusing = self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._give_up(ClosedError())

    def _tickets(self) -> list[Ticket]:
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
            settle(ticket.future, error)

    def _repeat(self, one: Callable[[], bool], lane: Lane) -> None:
        """Call `one` until it returns False. An exception ends the ring and is set on the future of every request."""
        try:
            with lane.active():
                while one():
                    pass
        except BaseException as error:
            self.failure = error
            self._give_up(error)
            with self._changed:
                self._changed.notify_all()

    def _prepare_one(self) -> bool:
        """Encode text and init audio of the next request and draw its noise."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or (self._waiting and len(self._ready) < MAX_READY))
            if self._stopping:
                return False
            ticket = self._waiting.popleft()
            self._busy.add(ticket)
        job, row, error = None, None, None
        try:
            if not ticket.future.cancelled():
                job, row = self._generator.ring_batch(ticket.request)
                ticket.prepared = self._text_lane.mark()
        except Exception as caught:
            error = caught
        with self._changed:
            self._busy.discard(ticket)
            ticket.job, ticket.row = job, row
            if row is not None:
                self._ready.append(ticket)
            self._changed.notify_all()
        if error is not None:
            settle(ticket.future, error)
        if row is not None:
            try:
                row.path.draw_ahead()  # drawing is faster than a step, so the sampler does not wait
            except Exception as caught:  # out of memory, for example: it fails this request, not the ring
                settle(ticket.future, caught)
        return True

    def _step(self) -> bool:
        """Remove cancelled requests, admit ready ones, and advance the ring by one step."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._inside or (self._ready and self._decoder_keeps_up()))
            if self._stopping:
                return False
            for ticket in [ticket for ticket in self._inside if ticket.future.cancelled()]:
                self._ring.remove(ticket)
                del self._inside[ticket]
            while self._ready and len(self._ring) < self.depth and self._decoder_keeps_up():
                self._admit(self._ready.popleft())
            self._changed.notify_all()
        if not self._ring:
            return True
        self.clock.begin()
        left = [(cast(Ticket, key), outcome) for key, outcome in self._ring.step()]
        self.clock.end()
        self._keep_pace()
        with self._changed:
            self.steps += 1
            for ticket, outcome in left:
                del self._inside[ticket]
                if isinstance(outcome, Exception):
                    ticket.row = None
                    continue
                self._times.append(time.perf_counter() - ticket.admitted)
                assert ticket.job is not None
                ticket.job.latents, ticket.sampled = outcome, self._last_step
                self._finished.append(ticket)
            self._changed.notify_all()
        for ticket, outcome in left:
            if isinstance(outcome, Exception):
                settle(ticket.future, outcome)
        return True

    def _admit(self, ticket: Ticket) -> None:
        if ticket.row is None or ticket.future.cancelled():
            return
        self._dit_lane.wait(ticket.prepared)
        self._dit_lane.hold(ticket.row.tensors)
        ticket.admitted = time.perf_counter()
        self._ring.admit(ticket, ticket.row)
        self._inside[ticket] = None

    def _keep_pace(self) -> None:
        """Wait for the previous step, so that at most two steps are queued when requests join or leave."""
        before, self._last_step = self._last_step, self._dit_lane.mark()
        if before is not None:
            before.synchronize()

    def _decoder_keeps_up(self) -> bool:
        """Return True while the decoder's queue is shorter than `depth`; latents would accumulate otherwise."""
        return len(self._finished) < self.depth

    def _decode_some(self) -> bool:
        """Decode the oldest finished request, together with others of equal length if the decoder takes rows."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._finished)
            if self._stopping:
                return False
            tickets = self._next_decoded()
            self._busy.update(tickets)
            self._changed.notify_all()
        outcomes = decode_tickets(self._generator, self._decoder_lane, tickets)
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            if outcome is not None:
                settle(ticket.future, outcome)
        with self._changed:
            self._busy.difference_update(tickets)
            self._changed.notify_all()
        return True

    def _next_decoded(self) -> list[Ticket]:
        """Remove and return the tickets of the next decoder forward: one, or as many as it takes without tiling."""
        first = self._finished.popleft()
        tickets = [first]
        max_batch = self._generator.decoder_rows(first.request.valid_frames) if first.on_window is None else 1
        while self._finished and len(tickets) < max_batch:
            other = self._finished[0]
            if other.on_window is not None or other.request.valid_frames != first.request.valid_frames:
                break
            tickets.append(self._finished.popleft())
        return tickets


def _rows_alone(generator: Generator) -> bool:
    """Return True if every request needs its own forward: larger batches are not faster on a CPU."""
    return generator.engines.devices.get("dit") == "cpu"
