"""Decode finished rows of a live ring: one sound window by window, or several of equal length in one forward."""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import TYPE_CHECKING

from sa3_trt_core.audio import autoencoder
from sa3_trt_core.errors import ToolError
from sa3_trt_core.sampling.inputs import sigmas_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sa3_trt_core.batch import Batch
    from sa3_trt_core.pipeline import Generator
    from sa3_trt_core.result import Result
    from sa3_trt_core.ring_requests import Ticket
    from sa3_trt_core.streams import Lane


def decode_tickets(generator: Generator, lane: Lane, tickets: Sequence[Ticket]) -> list[Result | Exception | None]:
    """Return the result or the exception of each ticket; None for a cancelled one.

    Several tickets are decoded in one forward; if that fails, one by one, so that each has its own error.
    """
    for ticket in tickets:
        lane.wait(ticket.sampled)
    outcomes: dict[Ticket, Result | Exception | None] = {ticket: _latent_error(ticket) for ticket in tickets}
    whole = [ticket for ticket in tickets if outcomes[ticket] is None and not ticket.future.cancelled()]
    if len(whole) > 1:
        try:
            outcomes.update(zip(whole, generator.decoded_together([_job(each) for each in whole]), strict=True))
            return list(outcomes.values())
        except Exception:
            whole = [ticket for ticket in whole if not ticket.future.cancelled()]
    for ticket in whole:
        try:
            outcomes[ticket] = _decoded(generator, ticket)
        except CancelledError:
            outcomes[ticket] = None
        except Exception as error:
            outcomes[ticket] = error
    return list(outcomes.values())


def _latent_error(ticket: Ticket) -> ToolError | None:
    """Return the error of a ticket with non-finite latents, else None; drop the reference to its row."""
    row, ticket.row = ticket.row, None
    assert row is not None
    try:
        row.path.require_finite()
    except ToolError as error:
        return error
    return None


def _job(ticket: Ticket) -> Batch:
    assert ticket.job is not None
    return ticket.job


def _decoded(generator: Generator, ticket: Ticket) -> Result:
    """Decode the latents of a ticket; pass samples to its `on_window` as they are decoded."""
    import torch

    from sa3_trt_core.result import Result

    job = ticket.job
    assert job is not None and job.latents is not None
    if ticket.on_window is None:
        return generator.decoded(job)
    parts = []
    with torch.inference_mode(), job.meter.stage("decode"):
        decoder, seconds = generator.engines.engine("decoder"), ticket.request.seconds
        heard = generator.audible_latents(job.latents, seconds).cpu()
        for part in autoencoder.decode_windows(decoder, heard, seconds, ticket.window):
            if ticket.future.cancelled():
                raise CancelledError
            ticket.on_window(part)
            parts.append(part)
    timings = dict(job.meter.timings)
    return Result(job.latents, sigmas_of(ticket.request), torch.cat(parts), timings, dict(job.meter.memory))
