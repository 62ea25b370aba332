"""Continuous batching with requests that arrive while it runs: same sounds, free slots, a full queue, an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sa3_trt_core import Generator, Request
from sa3_trt_core.audio import autoencoder
from sa3_trt_core.errors import ToolError
from sa3_trt_core.live_ring import ClosedError, LiveRing, QueueFullError

BASE = Request("slow piano, 70 BPM", 1.0, steps=3, seed=11)
ENDLESS = replace(BASE, steps=1000, seed=5)


@pytest.fixture(scope="module")
def generator(tiny_onnx: Path) -> Iterator[Generator]:
    with Generator.load(precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx) as loaded:
        yield loaded


@pytest.fixture
def ring(generator: Generator) -> Iterator[LiveRing]:
    with LiveRing(generator, depth=3, max_waiting=8) as live:
        yield live


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (88_200, 2)), 44_100, subtype="FLOAT")
    return path


def until(truth: Callable[[], bool]) -> None:
    for _ in range(3000):
        if truth():
            return
        time.sleep(0.01)
    raise AssertionError("not within 30 s")


def test_requests_of_any_kind_that_come_at_any_time_get_the_sound_they_get_alone(
    generator: Generator, ring: LiveRing, sound: Path
) -> None:
    rows = [
        BASE,
        replace(BASE, seconds=2.5, seed=2, steps=5),
        replace(BASE, prompt="techno", cfg=3.0, seed=3, negative_prompt="harsh"),
        replace(BASE, seed=4, init_audio=sound, inpaint=((0.2, 0.6),), init_noise_level=0.9, steps=1),
    ]
    first = [ring.submit(row) for row in rows[:2]]
    first[1].result(60)
    futures = [*first, *(ring.submit(row) for row in rows[2:])]
    for row, future in zip(rows, futures, strict=True):
        result, expected = future.result(60), generator.generate(row)
        assert torch.equal(result.latents, expected.latents) and torch.equal(result.audio, expected.audio)
        assert {"text", "sample", "decode"} <= result.timings.keys()


def test_a_request_enters_at_the_next_step_of_a_ring_that_runs(ring: LiveRing) -> None:
    slow = ring.submit(ENDLESS)
    until(lambda: ring.occupancy.ring == 1)
    ring.submit(BASE).result(60)
    assert not slow.done() and ring.occupancy.ring == 1
    slow.cancel()
    until(lambda: ring.occupancy.ring == 0)


def test_a_place_is_free_one_step_after_its_request_is_cancelled(ring: LiveRing) -> None:
    futures = [ring.submit(replace(ENDLESS, seed=seed)) for seed in range(3)]
    until(lambda: ring.occupancy.ring == 3)
    futures[1].cancel()
    cancelled_at = ring.steps
    until(lambda: ring.occupancy.ring == 2)
    assert ring.steps <= cancelled_at + 2  # the step under way, then none with it
    assert ring.submit(BASE).result(60).audio.shape == (44_100, 2)
    for future in futures:
        future.cancel()


def test_a_full_queue_is_refused_with_the_time_to_wait(ring: LiveRing) -> None:
    futures = [ring.submit(replace(ENDLESS, seed=seed)) for seed in range(3)]
    until(lambda: ring.occupancy.ring == 3)
    with pytest.raises(QueueFullError, match="8 requests wait") as refused:
        for _ in range(8 + 3):  # two are made ready besides, one is on its way there
            futures.append(ring.submit(ENDLESS))
            time.sleep(0.05)
    assert refused.value.retry_seconds >= 1
    for future in futures:
        future.cancel()
    until(lambda: ring.occupancy.waiting == ring.occupancy.ring == 0)
    assert ring.submit(BASE).result(60).audio.abs().max() > 0.01


def test_windows_joined_are_the_sound_in_windows(generator: Generator, ring: LiveRing) -> None:
    row, parts = replace(BASE, seconds=6.5, steps=1), []
    result = ring.submit(row, parts.append, 64).result(60)
    assert len(parts) >= 2 and torch.equal(torch.cat(parts), result.audio)
    decoder = generator.engines.engine("decoder")
    whole = autoencoder.finish(
        autoencoder.decode(decoder, generator.audible_latents(result.latents, row.seconds), 64), row.seconds
    )
    assert torch.equal(result.audio, whole)


def test_what_is_wrong_with_one_request_is_told_to_it_alone(ring: LiveRing, tmp_path: Path) -> None:
    missing = replace(BASE, init_audio=tmp_path / "none.wav", init_noise_level=0.5)
    bad, good = ring.submit(missing), ring.submit(BASE)
    with pytest.raises(ToolError, match="no such sound file"):
        bad.result(60)
    assert good.result(60).audio.shape == (44_100, 2)


def test_draining_finishes_what_was_taken_and_takes_no_more(ring: LiveRing) -> None:
    futures = [ring.submit(replace(BASE, seed=seed)) for seed in range(5)]
    assert ring.drain(60)
    assert all(future.done() for future in futures)
    with pytest.raises(ClosedError):
        ring.submit(BASE)


def test_closing_gives_up_what_is_not_finished(generator: Generator) -> None:
    before = threading.active_count()
    ring = LiveRing(generator, 1)
    futures = [ring.submit(ENDLESS), ring.submit(BASE)]
    until(lambda: ring.occupancy.ring == 1)
    assert not ring.drain(0.01)
    ring.close()
    for future in futures:
        with pytest.raises((ClosedError, CancelledError)):
            future.result(0)
    assert threading.active_count() == before


def test_a_generator_that_frees_its_models_has_no_ring(tiny_onnx: Path) -> None:
    with (
        Generator.load(precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx, free_models=True) as freeing,
        pytest.raises(ToolError, match="all models at once"),
    ):
        LiveRing(freeing, 2)
