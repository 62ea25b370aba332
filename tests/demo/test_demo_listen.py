"""The estimators used to score the demonstration model, on sounds with known tempo and key."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from sa3_demo import listen
from sa3_demo.music import FIRST_HELD_OUT, PROGRESSIONS, SCALES, draw_piece
from sa3_demo.synth import render
from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation import listener, spectra

SECONDS = 8
MAJOR, MINOR = ((0, 4, 7), (5, 9, 12), (7, 11, 14), (0, 4, 7)), ((0, 3, 7), (5, 8, 12), (7, 10, 14), (0, 3, 7))


def clicks(bpm: float, first: float = 0.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Return decaying noise on every beat from `first` seconds on, weaker between beats, stereo (N, 2)."""
    generator = np.random.default_rng(5)
    out = np.zeros((SECONDS * rate, 2))
    hit = generator.standard_normal((rate // 20, 2)) * np.exp(-np.arange(rate // 20) * 150.0 / rate)[:, None]
    for count, start in enumerate(np.arange(first, SECONDS - 0.1, 30.0 / bpm)):
        at = round(start * rate)
        out[at : at + len(hit)] += (0.3 if count % 2 == 0 else 0.1) * hit
    return out


def chords(tonic: int, shapes: tuple[tuple[int, ...], ...], tuning: float = 440.0) -> np.ndarray:
    """Return two seconds of every chord (2, N), each note a sine and its octave, from the C below A = `tuning` Hz."""
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    parts = []
    for notes in shapes:
        pitches = [tuning * 2.0 ** ((tonic + note - 9) / 12.0) for note in notes]
        parts.append(sum(np.sin(2 * np.pi * f * time) + 0.3 * np.sin(4 * np.pi * f * time) for f in pitches) / 6.0)
    return np.stack([np.concatenate(parts)] * 2)


def noise(samples: np.ndarray) -> np.ndarray:
    """Return white noise with the power of `samples`."""
    return np.random.default_rng(9).standard_normal(samples.shape) * samples.std()


@cache
def loop(index: int) -> np.ndarray:
    return render(draw_piece(FIRST_HELD_OUT + index, 10))


@pytest.mark.parametrize("bpm", [72.0, 85.5, 97.3, 110.0, 128.4, 140.0])
@pytest.mark.parametrize("first", [0.0, 0.37])
def test_the_tempo_of_clicks(bpm: float, first: float) -> None:
    tempo = listener.estimate_tempo(clicks(bpm, first), SAMPLE_RATE)
    assert tempo == pytest.approx(bpm, rel=0.005)


@pytest.mark.parametrize("bpm", [76.0, 104.0, 131.0])
def test_the_tempo_survives_noise_and_another_sample_rate(bpm: float) -> None:
    samples = clicks(bpm)
    assert listener.estimate_tempo(samples + noise(samples), SAMPLE_RATE) == pytest.approx(bpm, rel=0.01)
    assert listener.estimate_tempo(clicks(bpm, rate=22_050), 22_050) == pytest.approx(bpm, rel=0.01)


def test_a_tempo_outside_the_octave_is_heard_as_its_double_or_half() -> None:
    assert listener.estimate_tempo(clicks(60.0), SAMPLE_RATE) == pytest.approx(120.0, rel=0.005)
    assert listener.estimate_tempo(clicks(176.0), SAMPLE_RATE) == pytest.approx(88.0, rel=0.005)


def test_both_layouts_and_any_loudness_give_one_answer() -> None:
    samples = clicks(93.0)
    tempo = listener.estimate_tempo(samples, SAMPLE_RATE)
    assert listener.estimate_tempo(samples.T, SAMPLE_RATE) == tempo
    assert listener.estimate_tempo(samples * 0.5, SAMPLE_RATE) == pytest.approx(tempo, rel=0.005)
    tones = chords(2, MAJOR)
    assert (
        listener.estimate_key(tones.T * 0.01, SAMPLE_RATE) == listener.estimate_key(tones, SAMPLE_RATE) == (2, "major")
    )
    with pytest.raises(ValueError, match="expected samples"):
        listener.estimate_key(np.zeros((2, 0)), SAMPLE_RATE)


@pytest.mark.parametrize("tonic", range(12))
@pytest.mark.parametrize(("mode", "shapes"), [("major", MAJOR), ("minor", MINOR)])
def test_the_key_of_chords(tonic: int, mode: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    assert listener.estimate_key(chords(tonic, shapes), SAMPLE_RATE) == (tonic, mode)


def test_relatives_are_told_apart_by_the_chord_that_opens() -> None:
    """A minor and C major have the same four chords in different order."""
    a_minor = chords(9, ((0, 3, 7), (8, 12, 15), (3, 7, 10), (10, 14, 17)))
    c_major = np.roll(a_minor, -4 * SAMPLE_RATE, axis=1)  # begins with the third chord, C
    assert listener.estimate_key(a_minor, SAMPLE_RATE) == (9, "minor")
    assert listener.estimate_key(c_major, SAMPLE_RATE) == (0, "major")
    assert listener.same_notes((9, "minor"), (0, "major"))
    assert not listener.same_notes((9, "minor"), (9, "major"))


def test_the_key_survives_noise_and_a_little_detuning_and_moves_with_a_semitone() -> None:
    samples = chords(5, MINOR)
    assert listener.estimate_key(samples + noise(samples), SAMPLE_RATE) == (5, "minor")
    assert listener.estimate_key(chords(5, MINOR, tuning=444.0), SAMPLE_RATE) == (5, "minor")
    assert listener.estimate_key(chords(5, MINOR, tuning=440.0 * 2 ** (1 / 12)), SAMPLE_RATE) == (6, "minor")


def test_silence_and_short_clips_have_no_answer() -> None:
    silence = np.zeros((2, 3 * SAMPLE_RATE))
    assert listener.estimate_tempo(silence, SAMPLE_RATE) is None
    assert listener.estimate_key(silence, SAMPLE_RATE) is None
    assert listener.estimate_tempo(clicks(100.0)[:SAMPLE_RATE], SAMPLE_RATE) is None


def test_every_progression_opens_on_the_tonic() -> None:
    """`estimate_key` assumes this of the data."""
    assert set(PROGRESSIONS) == set(SCALES) == set(listener.TRIADS)
    assert {degrees[0] for group in PROGRESSIONS.values() for degrees in group} == {0}


@pytest.mark.parametrize("index", range(6))
def test_a_rendered_loop_is_heard_as_it_was_written(index: int) -> None:
    piece = draw_piece(FIRST_HELD_OUT + index, 10)
    assert listener.estimate_tempo(loop(index), SAMPLE_RATE) == pytest.approx(piece.bpm, rel=0.01)
    assert listener.estimate_key(loop(index), SAMPLE_RATE) == (piece.tonic, piece.mode)


def test_a_loop_played_faster_is_heard_faster_and_higher() -> None:
    """The same samples at another rate have another tempo and key: the estimates come from the sound."""
    piece = draw_piece(FIRST_HELD_OUT, 10)
    factor = 2 ** (2 / 12)
    assert listener.estimate_tempo(loop(0), SAMPLE_RATE * factor) == pytest.approx(piece.bpm * factor, rel=0.01)
    assert listener.estimate_key(loop(0), SAMPLE_RATE * factor) == ((piece.tonic + 2) % 12, piece.mode)


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-3])
@pytest.mark.parametrize("decibels", [-20.0, 0.0, 13.0, 60.0])
def test_si_sdr_is_the_ratio_of_what_is_alike_to_what_is_not(scale: float, decibels: float) -> None:
    generator = np.random.default_rng(1)
    reference, error = generator.standard_normal((2, 500, 2))
    error -= reference * (np.vdot(error, reference) / np.vdot(reference, reference))  # at right angles
    error *= np.linalg.norm(reference) / np.linalg.norm(error) * 10 ** (-decibels / 20)
    assert listen.si_sdr(reference, scale * (reference + error)) == pytest.approx(decibels, abs=1e-6)


def test_si_sdr_at_its_ends() -> None:
    signal, orthogonal = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert listen.si_sdr(signal, 2 * signal) == np.inf
    assert listen.si_sdr(signal, orthogonal) == -np.inf
    assert listen.si_sdr(signal, 0 * orthogonal) == -np.inf
    assert np.isnan(listen.si_sdr(0 * signal, signal))
    with pytest.raises(ValueError, match="2 samples against 3"):
        listen.si_sdr(signal, np.zeros(3))


@pytest.mark.parametrize("hertz", [60.0, 700.0, 5000.0])
def test_levels_are_those_of_the_band_that_sounds(hertz: float) -> None:
    tone = 0.1 * np.sin(2 * np.pi * hertz * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE)
    levels = listen.band_levels(np.stack([tone, tone]), SAMPLE_RATE)
    (band,) = [name for name in levels if name != "all" and inside(name, hertz)]
    assert levels[band] == pytest.approx(-20.0, abs=0.5) and levels["all"] == pytest.approx(-20.0, abs=0.5)
    assert all(level < -50.0 for name, level in levels.items() if name not in (band, "all"))
    softer = listen.band_levels(np.stack([tone, tone]) / 2, SAMPLE_RATE)
    assert softer[band] == pytest.approx(levels[band] - 6.02, abs=0.01)


def inside(band: str, hertz: float) -> bool:
    low, high = band.removesuffix(" Hz").split("-")
    return float(low) <= hertz < float(high)


def read_png(path: Path) -> np.ndarray:
    """Return the brightness (height, width) of a picture, 0 to 1, as another library decodes it."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB")).sum(axis=2) / sum(spectra.COLOURS[-1])


def test_a_spectrogram_shows_when_and_where_a_tone_sounds(tmp_path: Path) -> None:
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    tone = np.where(time < 1.0, np.sin(2 * np.pi * 800.0 * time), 0.0)
    spectra.spectrogram_png(tmp_path / "new" / "a.png", np.stack([tone, tone]))
    shades = read_png(tmp_path / "new" / "a.png")
    height, width = shades.shape
    row = int(np.argmax(shades[:, width // 4]))
    low, high = spectra.PICTURE_RANGE
    pitch = low * (high / low) ** ((height - row - 0.5) / height)
    assert pitch == pytest.approx(800.0, rel=0.05)
    assert height == spectra.PICTURE_ROWS
    assert shades.max() == 1 and shades[row, : width // 2 - 8].min() > 0.9
    assert shades[:, width // 2 + 8 :].max() == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_silence_is_a_black_picture(tmp_path: Path) -> None:
    spectra.spectrogram_png(tmp_path / "a.png", np.zeros((SAMPLE_RATE, 2)))
    assert not read_png(tmp_path / "a.png").any()
