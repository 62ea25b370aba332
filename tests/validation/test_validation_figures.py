"""Validation figures of arrays and sounds with known values, and gates on constructed reports."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sa3_trt_core.errors import ToolError
from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation.audio_metrics import audio_distance, sound_levels
from sa3_validation.distances import Distance, distance, spread
from sa3_validation.gates import Gate, judge, read_gates

TIME = np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE


def stereo(mono: np.ndarray) -> np.ndarray:
    return np.stack([mono, mono], axis=1).astype(np.float32)


def notes(*pitches: float, beats: float = 2.0, level: float = 0.3) -> np.ndarray:
    """Return tones that are struck at every beat, `beats` per second."""
    struck = np.exp(-6.0 * ((TIME * beats) % 1.0) / beats)
    return stereo(level * struck * sum(np.sin(2 * np.pi * pitch * TIME) for pitch in pitches) / len(pitches))


def test_equal_arrays_are_exactly_equal_and_others_are_not() -> None:
    values = np.random.default_rng(1).standard_normal((3, 5)).astype(np.float32)
    assert distance(values, values.copy()) == Distance(1.0, 0.0, 1.0)
    double = distance(values, 2 * values)
    assert (double.cosine, double.relative, double.gain) == pytest.approx((1.0, 1.0, 2.0))
    nothing = distance(values, np.zeros_like(values))
    assert math.isnan(nothing.cosine) and nothing.relative == 1.0 and nothing.gain == 0.0


@pytest.mark.parametrize(
    ("best", "worst", "five_percent"), [(math.inf, 0.0, 5.0), (-math.inf, 100.0, 95.0), (10.0, 100.0, 95.0)]
)
def test_the_worst_is_at_the_far_end_from_the_best(best: float, worst: float, five_percent: float) -> None:
    summary = spread([float(value) for value in range(101)], best)
    assert (summary.n, summary.worst, summary.median, summary.mean) == (101, worst, 50.0, 50.0)
    assert summary.p5 == pytest.approx(five_percent, abs=0.6)


def test_no_figure_and_nan_give_nan() -> None:
    assert math.isnan(spread([], math.inf).worst) and spread([], math.inf).n == 0
    assert math.isnan(spread([1.0, math.nan], math.inf).median)


def test_loudness_is_known_and_half_the_level_is_six_units_softer() -> None:
    tone = stereo(np.sin(2 * np.pi * 997.0 * TIME))
    # ITU-R BS.1770: a full-scale 997 Hz sine in one channel is -3.01 LUFS; in both, 3.01 louder.
    assert sound_levels(tone).loudness == pytest.approx(0.0, abs=0.1)
    distance = audio_distance(notes(440.0), 0.5 * notes(440.0))
    assert distance.loudness == pytest.approx(-6.02, abs=0.05)
    assert (distance.rms, distance.chroma) == pytest.approx((1.0, 1.0), abs=0.02)
    assert distance.spectral == pytest.approx(6.02, rel=0.25)


def test_each_figure_hears_what_it_stands_for() -> None:
    truth = notes(440.0, 550.0)
    retuned, faster = audio_distance(truth, notes(466.2, 622.3)), audio_distance(truth, notes(440.0, 550.0, beats=3.0))
    assert retuned.chroma is not None and retuned.chroma < 0.3 and retuned.onsets > 0.8 and retuned.rms > 0.95
    assert faster.onsets is not None and faster.onsets < 0.5 and faster.rms < 0.8 and faster.chroma > retuned.chroma
    assert retuned.spectral > 6.0 and faster.spectral > 3.0


def test_clipping_and_silence_are_shares() -> None:
    loud = np.clip(4.0 * notes(440.0), -1.0, 1.0)
    half = notes(440.0).copy()
    half[len(half) // 2 :] = 0.0
    distance = audio_distance(notes(440.0), loud)
    assert 0.001 < distance.clipped < 0.5 and sound_levels(notes(440.0)).clipped == 0.0
    assert sound_levels(half).silent == pytest.approx(0.5, abs=0.02)
    nothing = np.zeros_like(half)
    assert sound_levels(nothing).loudness is None and sound_levels(nothing).silent == 1.0
    silent = audio_distance(notes(440.0), nothing)
    assert silent.rms is None and silent.loudness is None and silent.silent == 1.0


REPORT = {"a": {"x": {"worst": 0.9}, "y": {"worst": 0.99}}, "list": [{"v": 1.0}, {"v": None}], "flag": True}


@pytest.mark.parametrize(
    ("gate", "figures"),
    [
        (Gate("a.*.worst", at_least=0.95), {"a.x.worst": False, "a.y.worst": True}),
        (Gate("a.x.worst", at_most=0.95), {"a.x.worst": True}),
        (Gate("a.x.worst", at_least=0.91, at_most=0.95), {"a.x.worst": False}),
        (Gate("list.*.v", at_least=0.5), {"list.0.v": True, "list.1.v": False}),
        (Gate("a.z.worst", at_least=0.5), {"a.z.worst": False}),
        (Gate("a.z.worst", at_least=0.5, optional=True), {}),
        (Gate("flag", at_least=0.5), {"flag": False}),
    ],
)
def test_a_gate_judges_every_figure_that_it_fits(gate: Gate, figures: dict[str, bool]) -> None:
    assert {verdict.figure: verdict.passed for verdict in judge(REPORT, [gate])} == figures


def test_the_line_of_a_gate_says_figure_value_limit_and_why() -> None:
    (verdict,) = judge(REPORT, [Gate("a.x.worst", at_least=0.95, why="a scale is wrong")])
    assert verdict.line == "FAIL a.x.worst: 0.9 (required >= 0.95): a scale is wrong"


def test_the_shipped_gates_are_read() -> None:
    assert "single_step.by_kind.text.denoised.cosine.worst" in {gate.figure for gate in read_gates(None)}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("format = 1\n", "has no [[gate]]"),
        ("format = 2\n[[gate]]\nfigure = 'a'\nat_least = 1\n", "has format 2"),
        ("[[gate]\n", "is not TOML"),
        ("format = 1\n[[gate]]\nat_least = 1\n", "gate 1 names no figure"),
        ("format = 1\n[[gate]]\nfigure = 'a'\n", "has no limit"),
        ("format = 1\n[[gate]]\nfigure = 'a'\nat_least = 'much'\n", "has no limit that is a number"),
        ("format = 1\n[[gate]]\nfigure = 'a'\nat_least = nan\n", "has no limit that is a number"),
        ("format = 1\n[[gate]]\nfigure = 'a'\nat_leest = 1\n", "has 'at_leest'"),
        ("format = 1\nmore = 1\n[[gate]]\nfigure = 'a'\nat_least = 1\n", "has 'more'"),
    ],
)
def test_a_wrong_gate_file_is_refused_by_name(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "gates.toml"
    path.write_text(text)
    with pytest.raises(ToolError) as refused:
        read_gates(path)
    assert "gates.toml" in refused.value.message and word in refused.value.message
    with pytest.raises(ToolError):
        read_gates(tmp_path / "absent.toml")
