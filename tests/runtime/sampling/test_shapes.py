"""Holds the length rules, the sigma list and the profiles to the published figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from sa3_trt_core import shapes
from sa3_trt_core.sampling.schedule import sigmas
from sa3_trt_core.shapes import CONTRACTS

PUBLISHED = [1.0, 0.9943755865, 0.9844802022, 0.9579122663, 0.8909031749, 0.7455465794, 0.5124973655, 0.2738850117, 0.0]


@pytest.mark.parametrize(
    ("seconds", "frames", "valid"), [(5, 120, 118), (30, 388, 387), (54, 646, 646), (60, 712, 710), (120, 1292, 1292)]
)
def test_length_table(seconds: float, frames: int, valid: int) -> None:
    assert shapes.latent_frames(seconds) == frames
    assert shapes.valid_frames(seconds, frames) == valid


def test_the_cap_opens_only_where_the_audio_would_not_fit() -> None:
    assert shapes.frame_cap(120) == shapes.DEFAULT_FRAME_CAP
    assert shapes.frame_cap(121) == shapes.MAX_FRAMES
    assert shapes.latent_frames(121, shapes.MAX_FRAMES) == 1368
    assert shapes.latent_frames(1000, shapes.MAX_FRAMES) == shapes.MAX_FRAMES


def test_the_longest_length_just_fills_the_engines_limit() -> None:
    assert abs(shapes.MAX_SECONDS - 374.435) < 1e-3
    assert shapes.latent_frames(shapes.MAX_SECONDS, 10**9) == shapes.MAX_FRAMES
    assert shapes.latent_frames(shapes.MAX_SECONDS + 0.1, 10**9) > shapes.MAX_FRAMES


@given(st.floats(shapes.MIN_SECONDS, shapes.MAX_SECONDS))
def test_frames_hold_the_audio_and_are_even(seconds: float) -> None:
    frames = shapes.latent_frames(seconds, shapes.frame_cap(seconds))
    assert frames % 2 == 0
    assert frames <= shapes.MAX_FRAMES
    assert frames * shapes.SAMPLES_PER_FRAME >= shapes.output_samples(seconds)
    assert shapes.valid_frames(seconds, frames) * shapes.SAMPLES_PER_FRAME >= shapes.output_samples(seconds)


def test_eight_steps_are_the_published_list() -> None:
    levels = sigmas(8)
    assert levels.dtype == torch.float32
    assert levels.tolist() == pytest.approx(PUBLISHED, abs=1e-6)


@given(st.integers(1, 200), st.floats(0.01, 1.0))
def test_schedules_fall_from_sigma_max_to_zero(steps: int, sigma_max: float) -> None:
    levels = sigmas(steps, sigma_max)
    assert levels.shape == (steps + 1,)
    assert levels[0] == torch.tensor(sigma_max, dtype=torch.float32)
    assert levels[-1] == 0
    assert bool((levels.diff() < 0).all())


@pytest.mark.parametrize(("steps", "sigma_max"), [(0, 1.0), (-1, 1.0), (8, 0.0), (8, 1.5), (8, float("nan"))])
def test_impossible_schedules_are_refused(steps: int, sigma_max: float) -> None:
    with pytest.raises(ValueError, match=r"steps?|sigma_max"):
        sigmas(steps, sigma_max)


def test_dit_profile() -> None:
    dit = CONTRACTS["dit"]
    by_name = {spec.name: spec for spec in (*dit.inputs, *dit.outputs)}
    assert list(by_name) == ["x", "t", "t5_hidden", "t5_mask", "seconds_total", "local_add_cond", "velocity"]
    assert {spec.dtype for spec in by_name.values()} == {"float32"}
    assert dit.shapes(by_name["x"], "min") == (1, 256, 1)
    assert dit.shapes(by_name["x"], "opt") == (1, 256, 1292)
    assert dit.shapes(by_name["x"], "max") == (8, 256, 4096)
    assert dit.shapes(by_name["local_add_cond"], "max") == (8, 257, 4096)
    assert dit.shapes(by_name["t5_hidden"], "max") == (8, 256, 768)
    assert dit.shapes(by_name["seconds_total"], "max") == (8,)


def test_codec_and_text_profiles() -> None:
    decoder, encoder, text = CONTRACTS["same-decoder"], CONTRACTS["same-encoder"], CONTRACTS["t5gemma"]
    assert [decoder.shapes(decoder.inputs[0], which) for which in ("min", "opt", "max")] == [
        (1, 256, 32),
        (1, 256, 1292),
        (1, 256, 4096),
    ]
    assert (decoder.outputs[0].name, decoder.outputs[0].dtype) == ("pcm", "int32")
    assert decoder.shapes(decoder.outputs[0], "max") == (1, 4096 * 4096, 2)
    assert encoder.shapes(encoder.inputs[0], "min") == (1, 2, 32 * 4096)
    assert encoder.shapes(encoder.outputs[0], "opt") == (1, 256, 1292)
    assert text.shapes(text.inputs[0], "min") == text.shapes(text.inputs[0], "max") == (1, 256)
    assert [spec.dtype for spec in text.inputs] == ["int64", "int64"]


def test_an_unknown_dimension_is_our_bug() -> None:
    with pytest.raises(ValueError, match="no such dimension"):
        CONTRACTS["dit"].shapes(shapes.TensorSpec("x", "float32", ("Q",)), "min")
