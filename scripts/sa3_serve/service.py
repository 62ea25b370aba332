"""State of the server: ring, status and first sound."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from sa3_serve.metrics import Metrics
from sa3_serve.settings import ServiceSettings
from sa3_trt_core import shapes
from sa3_trt_core.cli import again
from sa3_trt_core.cli.parser import make_parser
from sa3_trt_core.engines.base import Closeable
from sa3_trt_core.errors import ToolError
from sa3_trt_core.live_ring import LiveRing
from sa3_trt_core.request import Request

if TYPE_CHECKING:
    from sa3_trt_core.pipeline import Generator, Result

FIRST_SOUND = Request("", seconds=1.0, steps=1)


class Service(Closeable):
    """One generator in a live ring. `close` stops the ring and closes the generator."""

    def __init__(self, generator: Generator, settings: ServiceSettings, model: str) -> None:
        self.generator, self.settings, self.model = generator, settings, model
        self.precision = generator.engines.plan.precision
        self.identities = {stage: generator.engines.identity(stage) for stage in generator.engines.plan.stages}
        self.ring = LiveRing(generator, settings.depth, settings.max_waiting)
        self.metrics = Metrics(self.ring)
        self.draining = False
        self._usual = vars(make_parser().parse_args(["--prompt", ""]))  # cached: building a parser takes 5 ms
        self._first: Future[Result] | None = None
        self._lock = threading.Lock()

    @property
    def status(self) -> str:
        """Return the status: starting until the first sound, then ready; draining; failed when generation fails."""
        first = self._first
        if self.ring.failure is not None or (first is not None and first.done() and first.exception() is not None):
            return "failed"
        if self.draining:
            return "draining"
        return "ready" if first is not None and first.done() else "starting"

    def start(self) -> None:
        """Start the first sound, which compiles kernels and allocates buffers for later ones."""
        with self._lock:
            if self._first is None:
                self._first = self.ring.submit(FIRST_SOUND)

    def close(self) -> None:
        """Stop the ring, discarding its generations, and close the engines."""
        self.draining = True
        self.ring.close()
        self.generator.close()

    def describe(self) -> dict[str, Any]:
        """Return the entry of GET /v1/models."""
        settings = self.settings
        return {
            "id": self.model,
            "precision": self.precision,
            "sample_rate": shapes.SAMPLE_RATE,
            "channels": shapes.AUDIO_CHANNELS,
            "min_seconds": shapes.MIN_SECONDS,
            "max_seconds": settings.max_seconds,
            "max_steps": settings.max_steps,
            "max_body_bytes": settings.max_body,
            "depth": settings.depth,
            "engines": self.identities,
            "backends": dict(self.generator.engines.plan.backends),
            "init_audio": not settings.text_only,
            "token": settings.token_digest is not None,
            "loras": self.generator.loras.described(),
            "loras_digest": self.generator.loras.digest,
        }

    def require_loras(self, digest: str | None) -> None:
        """Raise ToolError unless `digest` is None or that of the loaded adapters."""
        own = self.generator.loras
        if digest is not None and digest != own.digest:
            named = "; ".join(own.described()) or "none"
            raise ToolError(
                f"this server's adapters are {own.digest} ({named}), not {ascii(digest)[1:-1][:20]}",
                "use a server with those adapters, or omit loras_digest",
            )

    def metadata(self, request: Request, window: int | None = None) -> dict[str, Any]:
        """Return the metadata of a sound as sa3_trt writes it, without the uploaded file; `window` is a stream's."""
        used = {stage: one for stage, one in self.identities.items() if stage != "encode" or request.init_audio}
        chunk = window or self.generator.engines.plan.chunk_frames
        run = {**self._usual, "dit": self.model, "precision": self.precision, "chunk_frames": chunk}
        about = again.metadata(request, run, used)
        about.pop("init_audio", None)
        if self.generator.loras:  # the digest only: clients must not see paths of this machine
            about["loras_digest"] = self.generator.loras.digest
        return about
