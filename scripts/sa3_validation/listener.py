"""Estimate tempo and key of a sound with NumPy.

The estimators assume the practice of dance loops: four beats a bar, diatonic keys, a loop that opens on its tonic
chord, and one octave of tempos. They do not read captions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation.spectra import Floats, chroma, mono, onset_strength, standard

Key = tuple[int, str]  # tonic 0..11 from C, and the name of a scale

SCALES: Mapping[str, tuple[int, ...]] = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
TEMPO_RANGE = (72, 140)  # beats a minute, within one octave: a measured tempo has one reading
TEMPO_TOLERANCE = 0.04  # relative tolerance against the stated tempo

# Tempo. The search ends short of an octave: a tempo and its double must never both be candidates.
MIN_TEMPO, MAX_TEMPO = 0.988 * TEMPO_RANGE[0], 1.008 * TEMPO_RANGE[1]  # beats a minute
TEMPO_STEP = 0.25  # of the grid; the best point is refined
REPEATS = {0.5: 0.5, 1.0: 1.0, 2.0: 1.0, 4.0: 1.0}  # lag in beats -> weight; four beats are a bar
MAX_LAG = 0.75  # share of the clip: longer lags overlap too little
PULSES = (1, 2, 4)  # a beat: quarter notes, eighths, sixteenths
MIN_SPECTRUM_SIZE = 1 << 15  # points of the onsets' spectrum: finer than the grid of tempos

# Key.
OPENING_SECONDS = 60.0 / TEMPO_RANGE[1] * 4  # shortest bar; the opening bar of every piece is the tonic chord
TRIADS = {"major": (0, 4, 7), "minor": (0, 3, 7)}


def estimate_tempo(samples: ArrayLike, sample_rate: float = SAMPLE_RATE) -> float | None:
    """Return the tempo in beats a minute within TEMPO_RANGE; None for silence and for clips shorter than 1.2 s.

    samples (N, 2), (2, N) or (N,). Onset strength is log-magnitude spectral flux in bands (Klapuri 1999). Every tempo
    of a fine grid is scored by the autocorrelation of the onsets at half a beat, a beat, two beats and a bar, and by
    the magnitude of their spectrum at one, two and four pulses a beat. The two err in different places, so their sum is
    used (Peeters 2007, "Template-based estimation of time-varying tempo"); its maximum is refined by a parabola.
    """
    onsets, rate = onset_strength(mono(samples), sample_rate)
    tempos = np.arange(MIN_TEMPO, MAX_TEMPO, TEMPO_STEP)
    beats = MAX_LAG * len(onsets) / rate * MIN_TEMPO / 60.0
    if beats < 1.0 or not onsets.any():
        return None
    repeats = _repeats(onsets, rate, tempos, {lag: weight for lag, weight in REPEATS.items() if lag <= beats})
    score = standard(repeats) + standard(_pulses(onsets, rate, tempos))
    return float(tempos[0] + TEMPO_STEP * _refined_peak(score))


def estimate_key(samples: ArrayLike, sample_rate: float = SAMPLE_RATE) -> Key | None:
    """Return tonic (0..11 from C) and mode ("major", "minor") at A = 440 Hz; None for silence.

    samples (N, 2), (2, N) or (N,). Each key is scored by the correlation of its scale with the chroma of the whole clip
    plus that of its tonic triad with the chroma of the opening. Correlating chroma with one profile a key is Krumhansl
    and Schmuckler's method (Krumhansl 1990); the profiles here are the notes of the scale and the triad.
    """
    pitches, rate = chroma(mono(samples), sample_rate)
    if not pitches.any():
        return None
    opening = pitches[: max(1, round(OPENING_SECONDS * rate))]
    best: tuple[float, Key] = (-np.inf, (0, "major"))
    for mode, scale in SCALES.items():
        correlations = _correlations(pitches.sum(axis=0), scale) + _correlations(opening.sum(axis=0), TRIADS[mode])
        tonic = int(np.argmax(correlations))
        best = max(best, (float(correlations[tonic]), (tonic, mode)))
    return best[1]


def same_notes(first: Key, second: Key) -> bool:
    """Return True when two keys have the same notes: equal keys or relatives (C major and A minor)."""
    notes = [{(tonic + step) % 12 for step in SCALES[mode]} for tonic, mode in (first, second)]
    return notes[0] == notes[1]


def _repeats(onsets: Floats, rate: float, tempos: Floats, weights: Mapping[float, float]) -> Floats:
    """Return the weighted sum over lags (in beats) of the onsets' autocorrelation, mean over bands, for every tempo."""
    frames = len(onsets)
    power = np.square(np.abs(np.fft.rfft(onsets, 2 * frames, axis=0))).sum(axis=1)
    autocorrelation = np.fft.irfft(power)[:frames]
    beat = 60.0 * rate / tempos
    frame = np.arange(frames)
    return np.sum([weight * np.interp(lag * beat, frame, autocorrelation) for lag, weight in weights.items()], axis=0)


def _pulses(onsets: Floats, rate: float, tempos: Floats) -> Floats:
    """Return the sum over PULSES of the magnitude of the onsets' spectrum, over bands, for every tempo."""
    size = max(MIN_SPECTRUM_SIZE, 1 << (2 * len(onsets)).bit_length())
    spectrum = np.fft.rfft(onsets * np.hanning(len(onsets))[:, None], size, axis=0)
    strength = np.sqrt(np.square(np.abs(spectrum)).sum(axis=1))
    frequencies = np.fft.rfftfreq(size, 1.0 / rate)
    return np.sum([np.interp(pulse * tempos / 60.0, frequencies, strength) for pulse in PULSES], axis=0)


def _refined_peak(score: Floats) -> float:
    """Return the position of a curve's maximum between its samples, by a parabola."""
    top = int(np.argmax(score))
    if not 0 < top < len(score) - 1:
        return float(top)
    before, here, after = score[top - 1 : top + 2]
    bend = before - 2.0 * here + after
    return top + (0.5 * (before - after) / bend if bend < 0.0 else 0.0)


def _correlations(chroma: Floats, notes: tuple[int, ...]) -> Floats:
    """Return the correlation (12,) of a chroma (12,) with a set of notes above every tonic."""
    spread = chroma - chroma.mean()
    length = float(np.linalg.norm(spread))
    return _profiles(notes) @ spread / length if length else np.zeros(12)


@lru_cache(maxsize=8)
def _profiles(notes: tuple[int, ...]) -> Floats:
    """Return rows (12, 12): the notes above every tonic, mean 0 and length 1."""
    profile = np.isin(np.arange(12), notes) - len(notes) / 12.0
    return np.stack([np.roll(profile, tonic) for tonic in range(12)]) / float(np.linalg.norm(profile))
