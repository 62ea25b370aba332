"""Routes: one sound, the served models, health, metrics, the page and the OpenAPI document."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, Query, Request as HttpRequest, Response
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse

from sa3_serve import answers, docs
from sa3_serve.guard import Guard, RefusedError
from sa3_serve.schema import SoundRequest
from sa3_serve.service import Service
from sa3_trt_core.errors import ToolError
from sa3_trt_core.live_ring import ClosedError, QueueFullError
from sa3_trt_core.version import __version__

NO_NETWORK = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; media-src blob:; img-src data:"
)
SAFE = {"content-security-policy": NO_NETWORK, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
ASKED = {
    "required": True,
    "content": {
        kind: {"schema": SoundRequest.model_json_schema()} for kind in ("application/json", "multipart/form-data")
    },
}


def create_app(service: Service) -> Guard:
    """Return the ASGI application of a service. Its lifespan generates the first sound and closes the service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(
        title="sa3_serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        description="Stable Audio 3: sounds from text, from sound, or from both.",
    )  # fmt: skip
    _add_generate(app, service)
    _add_views(app, service)
    _add_errors(app, service)
    return Guard(app, service.settings)


def _add_generate(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/audio/generate",
        summary="Generate a sound",
        description="The response is the sound; its comment and the header X-Sound contain its settings.",
        openapi_extra={"requestBody": ASKED},
        response_class=Response,
        responses={
            200: {"content": {"audio/wav": {}, "audio/flac": {}, "audio/mpeg": {}, "audio/ogg": {}}},
            422: {"description": "what is wrong and what to do, two lines", "content": {"text/plain": {}}},
            429: {"description": "the queue is full; Retry-After has the seconds to wait"},
        },
    )
    async def generate(
        http: HttpRequest, stream: bool = Query(False, description="a WAV, window by window as it is decoded")
    ) -> Response:
        answer = await answers.generate(service, http, stream)
        service.metrics.answers.labels(str(answer.status_code)).inc()
        return answer


def _add_views(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", summary="List the served model")
    async def models() -> dict[str, Any]:
        return {"models": [service.describe()]}

    @app.get("/healthz", summary="Ready once the first sound has been generated")
    async def health() -> JSONResponse:
        status = service.status
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics", summary="Figures in Prometheus' text format", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def reference() -> HTMLResponse:
        return HTMLResponse(docs.render(app.openapi()), headers=SAFE)

    for path, (name, kind) in PAGE.items():
        _add_file(app, path, name, kind)


def _add_file(app: FastAPI, path: str, name: str, kind: str) -> None:
    text = resources.files("sa3_serve").joinpath(name).read_text("utf-8")

    @app.get(path, include_in_schema=False, name=name)
    async def file() -> Response:
        return Response(text, media_type=kind, headers=SAFE)


def _add_errors(app: FastAPI, service: Service) -> None:
    def lines(status: int, error: ToolError, headers: dict[str, str] | None = None) -> Response:
        return PlainTextResponse(f"{error.lines()}\n", status, headers)

    @app.exception_handler(ToolError)
    async def mistake(http: HttpRequest, error: ToolError) -> Response:
        status, headers = 422, None
        if isinstance(error, RefusedError):
            status = error.status
        elif isinstance(error, QueueFullError):
            status, headers = 429, {"retry-after": f"{error.retry_seconds:.0f}"}
        elif isinstance(error, ClosedError | answers.NotReadyError):
            status, headers = 503, {"retry-after": "5"}
        elif isinstance(error, answers.EngineError):
            status = 500
        if http.url.path == "/v1/audio/generate":
            service.metrics.answers.labels(str(status)).inc()
        return lines(status, error, headers)

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> Response:
        return lines(error.status_code, ToolError(str(error.detail), "see /docs"), dict(error.headers or {}))
