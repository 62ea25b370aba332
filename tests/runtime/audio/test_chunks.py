"""Encoding and decoding in windows: each frame from exactly one window, output equal to a single call's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import onnx_of
from hypothesis import given, settings, strategies as st

from sa3_trt_core import Generator, Request
from sa3_trt_core.audio import autoencoder
from sa3_trt_core.audio.tiling import CONTEXT, MAX_SHOT_LENGTH, MIN_CHUNK, chunks
from sa3_trt_core.engines.base import DeviceEngine
from sa3_trt_core.engines.onnxruntime import OnnxRuntimeEngine
from sa3_trt_core.shapes import MAX_FRAMES, latent_frames, valid_frames
from sa3_trt_core.targets import find_dit

REACH = find_dit("medium").reach or 0


@given(st.integers(1, MAX_FRAMES), st.one_of(st.just(0), st.integers(MIN_CHUNK, MAX_FRAMES)))
@settings(deadline=None)
def test_every_frame_comes_from_exactly_one_window(frames: int, size: int) -> None:
    windows = chunks(frames, size)
    assert [frame for window in windows for frame in range(window.first, window.last)] == list(range(frames))
    for window in windows:
        assert window.stop - window.start == (min(size, frames) if size else frames)
        assert 0 <= window.start <= window.first < window.last <= window.stop <= frames
        assert window.start == 0 or window.first - window.start >= CONTEXT
        assert window.stop == frames or window.stop - window.last >= CONTEXT


class Blurring(DeviceEngine):
    """An autoencoder that sums integers up to `REACH` frames away and records the lengths of its inputs."""

    input_names, output_names = ("latent",), ("audio",)

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        window = torch.ones(1, 1, 2 * REACH + 1)
        if "latent" in inputs:
            frames = torch.nn.functional.conv1d(inputs["latent"][:, :1], window, padding=REACH)
            self.lengths.append(frames.shape[-1])
            return {"audio": frames.repeat_interleave(4096, dim=-1).expand(1, 2, -1)}
        frames = torch.nn.functional.conv1d(inputs["audio"][:, :1, ::4096], window, padding=REACH)
        self.lengths.append(frames.shape[-1])
        return {"latent": frames.expand(1, 256, -1)}


@given(st.floats(0.01, 40.0), st.sampled_from([0, MIN_CHUNK]))
@settings(max_examples=25, deadline=None)
def test_a_sound_needs_the_latents_within_the_decoders_reach_and_no_others(seconds: float, size: int) -> None:
    frames = valid_frames(seconds, latent_frames(seconds))
    latents = torch.randint(-8, 9, (1, 256, frames)).float()
    sounds = [
        autoencoder.finish(autoencoder.decode(Blurring(), latents[..., :count], size), seconds)
        for count in (frames, autoencoder.required_frames(seconds, frames, REACH))
    ]
    assert torch.equal(*sounds)
    assert autoencoder.required_frames(seconds, frames, REACH) < frames
    assert autoencoder.required_frames(seconds, frames, None) == frames


@given(st.integers(1, 400), st.integers(MIN_CHUNK, 150))
@settings(max_examples=25, deadline=None)
def test_what_lies_within_reach_is_seen_and_no_engine_is_given_less_than_it_takes(frames: int, size: int) -> None:
    engine = Blurring()
    latents = torch.randint(-9, 9, (1, 256, frames), generator=torch.Generator().manual_seed(frames)).float()
    assert torch.equal(autoencoder.decode(engine, latents, size), autoencoder.decode(Blurring(), latents))
    audio = latents[0, :2].repeat_interleave(4096, dim=-1)
    assert torch.equal(autoencoder.encode(engine, audio, size), autoencoder.encode(Blurring(), audio))
    assert all(32 <= length <= max(32, size) for length in engine.lengths)
    assert len(set(engine.lengths)) == 1


def test_a_real_autoencoder_in_windows_equals_one_piece(tiny_onnx: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 256, 150, generator=generator)
    with OnnxRuntimeEngine(onnx_of(tiny_onnx, "same-l-decoder-fp32")) as engine:
        whole, parts = (autoencoder.decode(engine, latents, size) for size in (0, 64))
    assert float((parts - whole).norm() / whole.norm()) <= 1e-4  # 16-bit samples: half a step is 1.5e-5 of full scale
    audio = 0.1 * torch.randn(2, 150 * 4096, generator=generator)
    with OnnxRuntimeEngine(onnx_of(tiny_onnx, "same-l-encoder")) as engine:
        whole, parts = (autoencoder.encode(engine, audio, size) for size in (0, 64))
    assert float((parts - whole).norm() / whole.norm()) <= 1e-5
    assert float(whole.abs().max()) > 0.1


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "noise.wav"
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, (88_200, 2)), 44_100, subtype="FLOAT")
    return path


def test_generations_in_windows_are_those_in_one_piece(tiny_onnx: Path, sound: Path) -> None:
    """Long sounds use windows by default, for the encoder too; --chunk-frames 0 turns windows off."""
    request = Request("piano", 43.0, steps=1, seed=1, init_audio=sound, init_noise_level=0.5)
    assert request.frames > MAX_SHOT_LENGTH >= replace(request, seconds=41.0).frames
    result_by_size = {}
    for size in (None, 0):
        with Generator.load(
            precision="fp32", backend="onnxruntime", onnx_root=tiny_onnx, chunk_frames=size
        ) as generator:
            result_by_size[size] = generator.generate(request)
    assert result_by_size[None].audio.shape == (43 * 44_100, 2)
    assert float((result_by_size[None].latents - result_by_size[0].latents).abs().max()) <= 1e-4
    assert float((result_by_size[None].audio - result_by_size[0].audio).norm() / result_by_size[0].audio.norm()) <= 1e-3
    assert not torch.equal(
        result_by_size[None].latents, result_by_size[0].latents
    )  # windows of the encoder round otherwise
    assert not torch.equal(result_by_size[None].audio, result_by_size[0].audio)
