"""Length rules, sigmas and profiles compared with the published figures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from sa3_trt_core import shapes
from sa3_trt_core.sampling.schedule import sigmas
from sa3_trt_core.shapes import CONTRACTS

PUBLISHED = [1.0, 0.9943755865, 0.9844802022, 0.9579122663, 0.8909031749, 0.7455465794, 0.5124973655, 0.2738850117, 0.0]


@pytest.mark.parametrize(
    ("seconds", "frames", "valid"),
    [
        (5, 120, 118), (5.127, 120, 120), (30, 388, 387), (54, 646, 646), (60, 712, 710), (117, 1326, 1324),
        (120, 1358, 1356), (374.4, 4096, 4096), (380, 4096, 4096),
    ],
)  # fmt: skip
def test_length_table(seconds: float, frames: int, valid: int) -> None:
    assert shapes.latent_frames(seconds) == frames
    assert shapes.valid_frames(seconds, frames) == valid


def test_the_cap_is_the_checkpoints_own_and_the_padding_shrinks_under_it() -> None:
    assert shapes.latent_frames(120, cap=1292) == 1292
    assert abs(shapes.MAX_SECONDS - 380.4357) < 1e-4
    assert shapes.frames_before(shapes.MAX_SECONDS) == shapes.MAX_FRAMES == shapes.latent_frames(shapes.MAX_SECONDS)
    assert shapes.valid_frames(378.0, 4096) == 4096 == shapes.frames_before(378.0) + 26


# Of the model's own generation at other paddings (seconds, padding, frames, valid).
@pytest.mark.parametrize(
    ("padding", "frames", "valid"), [(0.0, 54, 54), (2.5, 82, 80), (6.0, 120, 118), (20.0, 270, 269)]
)
def test_another_padding(padding: float, frames: int, valid: int) -> None:
    assert shapes.latent_frames(5, padding) == frames
    assert shapes.valid_frames(5, frames, padding) == valid


@given(st.floats(shapes.MIN_SECONDS, shapes.MAX_SECONDS), st.floats(0.0, 60.0))
def test_frames_hold_the_audio_and_are_even(seconds: float, padding: float) -> None:
    frames = shapes.latent_frames(seconds, padding)
    assert frames % 2 == 0
    assert frames <= shapes.MAX_FRAMES
    assert frames * shapes.SAMPLES_PER_FRAME >= shapes.output_samples(seconds)
    valid = shapes.valid_frames(seconds, frames, padding)
    assert valid <= frames and valid * shapes.SAMPLES_PER_FRAME >= shapes.output_samples(seconds)


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


def test_the_other_order_of_warp_and_scale_is_that_of_the_models_main_branch() -> None:
    """Levels of the native package, which rise after the first; both orders agree at sigma_max 1."""
    levels = sigmas(8, 0.7, "scale-then-warp").tolist()
    published = [0.7, 0.9535803, 0.9092903, 0.8302641, 0.7047457, 0.5380513, 0.3623913, 0.2171250, 0.0]
    assert levels == pytest.approx(published, abs=1e-6)
    assert torch.equal(sigmas(8, 1.0, "scale-then-warp"), sigmas(8))
    with pytest.raises(ValueError, match="scale-then-warp"):
        sigmas(8, 0.7, "both")


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
    assert [decoder.shapes(decoder.inputs[0], bound) for bound in ("min", "opt", "max")] == [
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
