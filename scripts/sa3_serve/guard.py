"""Checks of every request before its route: token, host, origin, body size and transfer time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sa3_serve.settings import ServiceSettings
from sa3_trt_core.errors import ToolError

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/healthz", "/page.js", "/page.css"})  # no data, no side effects
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
DRAIN_SECONDS, DRAIN_BYTES = (
    1.0,
    1 << 20,
)  # limits of reading the rest of a body, so that the client receives the response
MAX_JSON = 256 << 10  # bytes of a JSON body


class RefusedError(ToolError):
    """Raised to answer with a status and two lines of text, and close the connection."""

    def __init__(self, status: int, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.status = status


class Guard:
    """ASGI middleware that checks token, host, origin, body size and transfer time."""

    def __init__(self, app: App, settings: ServiceSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body = _Body(receive, self._max_size(headers), self._settings.body_seconds, _has_body(headers))
        started = False

        async def closing(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                await body.drain()
                if body.more:  # close the connection: the server would otherwise read all of the rest
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self._app(scope, body.receive, closing)
        except RefusedError as refused:
            if started:
                raise
            await _answer(closing, refused)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Check path and headers before the body is read. Raises RefusedError."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._settings.local and _name(host) not in LOCAL_NAMES:
            # DNS rebinding: pages of another site could read responses by a name that resolves to this machine.
            raise RefusedError(421, "this server answers for localhost only", "ask http://127.0.0.1:PORT")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            raise RefusedError(403, "a page of another site asks", "use the page of this server")
        if path not in OPEN_PATHS and not self._settings.admits(headers.get(b"authorization")):
            raise RefusedError(401, "the bearer token is missing or wrong", "send Authorization: Bearer TOKEN")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and len(length) < 20 and int(length) > self._max_size(headers):
            raise _too_large(self._max_size(headers))

    def _max_size(self, headers: dict[bytes, bytes]) -> int:
        form = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
        return self._settings.max_body if form else min(MAX_JSON, self._settings.max_body)


class _Body:
    """Stream of a request body, limited to `max_bytes` bytes and `seconds` seconds."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float, more: bool) -> None:
        self._receive, self._max_bytes, self._taken = receive, max_bytes, 0
        self._deadline = asyncio.get_running_loop().time() + seconds
        self.more = more

    async def receive(self) -> Message:
        """Return the next part, or the disconnect message. Raises RefusedError."""
        if not self.more:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise RefusedError(408, "the request took too long to arrive", "send it faster") from None
        self._taken += len(message.get("body", b""))
        if self._taken > self._max_bytes:
            raise _too_large(self._max_bytes)
        self.more = bool(message.get("more_body", False))
        return message

    async def drain(self) -> None:
        """Read the rest of a small body: closing with unread bytes resets the connection and loses the response."""
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while self.more and self._taken < DRAIN_BYTES:
                    message = await self._receive()
                    self._taken += len(message.get("body", b""))
                    self.more = bool(message.get("more_body", False))
        except TimeoutError:
            return


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0").strip(b"0 ") != b""


def _too_large(max_bytes: int) -> RefusedError:
    return RefusedError(413, f"the request is larger than {max_bytes} bytes", "send less; a part of a sound is enough")


def _name(host: str) -> str:
    """Return the name of a Host header without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host


async def _answer(send: Send, refused: RefusedError) -> None:
    body = f"{refused.lines()}\n".encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
