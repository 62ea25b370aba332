"""uvicorn server with a time limit for request headers, and exit code 0 after a graceful shutdown."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from sa3_serve.service import Service

HEAD_SECONDS = 10.0  # for the first line and the headers


class PatientlessProtocol(H11Protocol):
    """HTTP/1.1 protocol that closes a connection with incomplete headers after HEAD_SECONDS; uvicorn has no limit."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Run a timer while headers are incomplete: before the first request, or after an answered one."""
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _stop(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """A uvicorn server that finishes accepted requests after a signal, and then returns.

    uvicorn raises the signal again, which a supervisor would read as a crash.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown; a second signal does not wait for the ring's generations."""
        self._service.draining = True
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(service: Service, app: Any, host: str, port: int, access_log: bool) -> Server:
    """Return the server, not started."""
    config = uvicorn.Config(
        app, host=host, port=port, http=PatientlessProtocol, ws="none", lifespan="on", log_level="warning",
        access_log=access_log, server_header=False, timeout_keep_alive=15, backlog=512,
        timeout_graceful_shutdown=max(1, round(service.settings.drain_seconds)),
    )  # fmt: skip
    return Server(config, service)
