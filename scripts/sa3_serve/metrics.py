"""Metrics of the server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily

from sa3_trt_core import gpu

if TYPE_CHECKING:
    from sa3_trt_core.live_ring import LiveRing
    from sa3_trt_core.pipeline import Result

STAGE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Metrics of one server, in its own registry so that servers in one process are separate."""

    def __init__(self, ring: LiveRing) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.registry.register(_RingCollector(ring))
        self.answers = Counter(
            "sa3_requests", "Requests for a sound by response status (499: client disconnected)", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds_of_sound = Counter("sa3_sound_seconds", "Seconds of sound generated", registry=self.registry)
        self.whole = Histogram(
            "sa3_request_seconds",
            "Seconds from the complete request to the sound",
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "sa3_stage_seconds", "Seconds of each stage per sound", ["stage"], buckets=STAGE_BUCKETS,
            registry=self.registry,
        )  # fmt: skip

    def count_sound(self, result: Result, seconds: float, elapsed: float) -> None:
        """Record a sound of length `seconds` that took `elapsed` seconds since its request."""
        self.seconds_of_sound.inc(seconds)
        self.whole.observe(elapsed)
        for stage, taken in result.timings.items():
            self.stages.labels(stage).observe(taken)

    def text(self) -> bytes:
        """Return the current exposition."""
        return generate_latest(self.registry)


class _RingCollector:
    """Collector of the ring's figures at scrape time."""

    def __init__(self, ring: LiveRing) -> None:
        self._ring = ring

    def collect(self) -> Iterator[Any]:
        ring, now = self._ring, self._ring.occupancy
        figures: list[tuple[str, str, float | None]] = [
            ("sa3_queue_requests", "Requests that wait for a slot of the ring", now.waiting),
            ("sa3_queue_limit", "Length limit of the queue", ring.max_waiting),
            ("sa3_ring_requests", "Requests in the ring", now.ring),
            ("sa3_ring_places", "Slots of the ring", ring.depth),
            ("sa3_ring_steps", "Steps of the ring so far", ring.steps),
            ("sa3_decoding_requests", "Sounds decoding or waiting for the decoder", now.decoding),
            ("sa3_gpu_memory_bytes", "GPU memory in use by all processes", gpu.memory_in_use()),
        ]
        for name, about, value in figures:
            if value is not None:
                yield GaugeMetricFamily(name, about, value=value)
