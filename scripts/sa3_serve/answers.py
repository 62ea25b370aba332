"""Answer requests for a sound: submit to the ring, wait for the result, encode it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from sa3_serve.schema import SoundRequest
from sa3_serve.service import Service
from sa3_serve.uploads import read_request
from sa3_trt_core.audio import encode, io as audio_io
from sa3_trt_core.errors import ToolError
from sa3_trt_core.live_ring import ClosedError
from sa3_trt_core.request import Request
from sa3_trt_core.shapes import output_samples

if TYPE_CHECKING:
    from torch import Tensor

    from sa3_trt_core.pipeline import Result

CLIENT_LEFT = 499  # never sent; counted by the metrics


class NotReadyError(ToolError):
    """Raised for a request before the first sound, or after a failure of the engines."""


class EngineError(ToolError):
    """Raised when generation fails for a reason outside the request."""


async def generate(service: Service, http: HttpRequest, stream: bool) -> Response:
    """Return the response to a request for a sound. Raises ToolError."""
    if service.draining:
        raise ClosedError
    if service.status != "ready":
        raise NotReadyError(f"the server is {service.status}", "ask /healthz, and try again when it is ready")
    # Uploaded files are removed when the response is ready or the request is refused.
    with contextlib.ExitStack() as cleanup:
        asked, request = await read_request(http, service.settings, cleanup)
        service.require_loras(asked.loras_digest)
        if service.settings.log_prompts:
            print(json.dumps({"prompt": request.prompt, "seed": request.seed}), file=sys.stderr, flush=True)
        if not stream:
            return await _whole(service, http, asked, request)
        if asked.format != "wav":
            raise ToolError(f"?stream=1 does not support the format {asked.format}", "omit format, or ?stream=1")
        return await _streamed(service, http, request, cleanup)


async def _whole(service: Service, http: HttpRequest, asked: SoundRequest, request: Request) -> Response:
    started = time.perf_counter()
    future = service.ring.submit(request)
    result = await _unless_gone(http, future)
    if result is None:
        return Response(status_code=CLIENT_LEFT)
    service.metrics.count_sound(result, request.seconds, time.perf_counter() - started)
    data = await run_in_threadpool(_bytes, asked.format, result, service.metadata(request))
    return Response(data, headers=_headers(service, request, asked.format, result.timings))


def _bytes(kind: str, result: Result, metadata: dict[str, object]) -> bytes:
    return encode.audio_bytes(kind, audio_io.tame(result.samples, "clip"), metadata)


async def _streamed(service: Service, http: HttpRequest, request: Request, cleanup: contextlib.ExitStack) -> Response:
    loop, started = asyncio.get_running_loop(), time.perf_counter()
    windows: asyncio.Queue[Tensor | None] = asyncio.Queue()

    def put(item: Tensor | None) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: no consumer is left
            loop.call_soon_threadsafe(windows.put_nowait, item)

    future = service.ring.submit(request, put, service.settings.window)
    future.add_done_callback(lambda _: put(None))
    first: asyncio.Future[Tensor | None] = asyncio.ensure_future(windows.get())
    gone: asyncio.Future[None] = asyncio.ensure_future(_disconnected(http))
    both: set[asyncio.Future[Any]] = {first, gone}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not first.done():
        first.cancel()
        future.cancel()
        return Response(status_code=CLIENT_LEFT)
    if first.result() is None:
        _raise_if_failed(future)
    kept = cleanup.pop_all()

    async def body() -> AsyncIterator[bytes]:
        with kept:
            try:
                yield encode.wav_header(
                    output_samples(request.seconds), service.metadata(request, service.settings.window)
                )
                window = first.result()
                while window is not None:
                    yield encode.pcm_bytes(audio_io.tame(window, "clip"))
                    window = await windows.get()
                _raise_if_failed(future)  # after the headers are sent, only a broken connection can signal the failure
                service.metrics.count_sound(future.result(), request.seconds, time.perf_counter() - started)
            finally:
                future.cancel()

    headers = _headers(service, request, "wav", {})
    head = len(encode.wav_header(0, service.metadata(request, service.settings.window)))
    headers["content-length"] = str(head + len(encode.pcm_bytes(_silence(1))) * output_samples(request.seconds))
    return StreamingResponse(body(), headers=headers)


def _silence(samples: int) -> Tensor:
    import torch

    return torch.zeros(samples, 2)


async def _unless_gone(http: HttpRequest, future: Future[Result]) -> Result | None:
    """Return the result; if the client disconnects, cancel the request and return None. Raises ToolError."""
    sound = asyncio.ensure_future(asyncio.wrap_future(future))
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        both: set[asyncio.Future[Any]] = {sound, gone}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not sound.done():
            return None
        _raise_if_failed(future)
        return sound.result()
    finally:
        gone.cancel()
        sound.cancel()
        future.cancel()


async def _disconnected(http: HttpRequest) -> None:
    """Wait until the client disconnects."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _raise_if_failed(future: Future[Result]) -> None:
    """Raise the error of a failed generation: EngineError unless the request caused it."""
    error = future.exception() if not future.cancelled() else ClosedError()
    if error is None or isinstance(error, ClosedError):
        if error is not None:
            raise error
        return
    print(f"a sound could not be made: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if isinstance(error, ToolError):
        raise EngineError(error.message, error.hint) from None
    raise EngineError("generation failed", "the server's log has the error") from None


def _headers(service: Service, request: Request, kind: str, timings: dict[str, float]) -> dict[str, str]:
    about = {
        name: value for name, value in service.metadata(request).items() if name not in ("prompt", "negative_prompt")
    }
    about["timings"] = {stage: round(seconds, 6) for stage, seconds in timings.items()}
    return {
        "content-type": encode.MEDIA_TYPES[kind],
        "content-disposition": f'inline; filename="sa3_{request.seed}.{kind}"',
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "x-sound": json.dumps(about, ensure_ascii=True),
    }
