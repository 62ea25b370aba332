"""Tempo and key as they are heard in a sound, with nothing but NumPy.

The estimators know the common practice of dance loops (four beats a bar, diatonic keys, a loop that opens on its tonic
chord) and one octave of tempos; they never see a caption.
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
TEMPO_TOLERANCE = 0.04  # relative: how near a tempo has to be to the stated one

# Tempo. The search ends short of an octave: a tempo and its double must never both be candidates.
SLOWEST, FASTEST = 0.988 * TEMPO_RANGE[0], 1.008 * TEMPO_RANGE[1]  # beats a minute
TEMPO_STEP = 0.25  # of the grid; the best point is refined
REPEATS = {0.5: 0.5, 1.0: 1.0, 2.0: 1.0, 4.0: 1.0}  # lag in beats -> weight; four beats are a bar
LONGEST_LAG = 0.75  # of the clip: longer lags compare too little with too little
PULSES = (1, 2, 4)  # a beat: quarter notes, eighths, sixteenths
SPECTRUM_SIZE = 1 << 15  # points of the onsets' spectrum, at least: finer than any two tempos of the grid

# Key.
OPENING_SECONDS = 60.0 / TEMPO_RANGE[1] * 4  # the shortest bar: its chord is the tonic's in every piece
TRIADS = {"major": (0, 4, 7), "minor": (0, 3, 7)}


def estimate_tempo(samples: ArrayLike, sample_rate: float = SAMPLE_RATE) -> float | None:
    """Beats a minute within the octave of TEMPO_RANGE; None for silence and for clips shorter than 1.2 s.

    samples (N, 2), (2, N) or (N,). Onset strength is log-magnitude spectral flux in bands (Klapuri 1999). Every tempo
    of a fine grid is scored twice: by how alike the onsets are half a beat, a beat, two beats and a bar later, and by
    the strength of their pulse at one, two and four a beat. One errs where the other does not, so their sum counts
    (Peeters 2007, "Template-based estimation of time-varying tempo"); its maximum is refined by a parabola.
    """
    onsets, rate = onset_strength(mono(samples), sample_rate)
    tempos = np.arange(SLOWEST, FASTEST, TEMPO_STEP)
    beats = LONGEST_LAG * len(onsets) / rate * SLOWEST / 60.0
    if beats < 1.0 or not onsets.any():
        return None
    repeats = _repeats(onsets, rate, tempos, {lag: weight for lag, weight in REPEATS.items() if lag <= beats})
    score = standard(repeats) + standard(_pulses(onsets, rate, tempos))
    return float(tempos[0] + TEMPO_STEP * _refined_peak(score))


def estimate_key(samples: ArrayLike, sample_rate: float = SAMPLE_RATE) -> Key | None:
    """Tonic (0..11 from C) and mode ("major", "minor"), at A = 440 Hz; None for silence.

    samples (N, 2), (2, N) or (N,). Each key is scored by the correlation of its scale with the chroma of the whole clip
    plus that of its tonic triad with the chroma of the opening. Correlating chroma with a profile a key is
    Krumhansl and Schmuckler's method (Krumhansl 1990); the profiles here are the scale's and the triad's own notes.
    """
    pitches, rate = chroma(mono(samples), sample_rate)
    if not pitches.any():
        return None
    opening = pitches[: max(1, round(OPENING_SECONDS * rate))]
    best: tuple[float, Key] = (-np.inf, (0, "major"))
    for mode, scale in SCALES.items():
        likeness = _correlations(pitches.sum(axis=0), scale) + _correlations(opening.sum(axis=0), TRIADS[mode])
        tonic = int(np.argmax(likeness))
        best = max(best, (float(likeness[tonic]), (tonic, mode)))
    return best[1]


def same_notes(first: Key, second: Key) -> bool:
    """Whether two keys have the same notes: they are equal or relatives (C major and A minor)."""
    notes = [{(tonic + step) % 12 for step in SCALES[mode]} for tonic, mode in (first, second)]
    return notes[0] == notes[1]


def _repeats(onsets: Floats, rate: float, tempos: Floats, weights: Mapping[float, float]) -> Floats:
    """The autocorrelation of onsets, mean over bands, at these lags in beats of every tempo, weighted and summed."""
    frames = len(onsets)
    power = np.square(np.abs(np.fft.rfft(onsets, 2 * frames, axis=0))).sum(axis=1)
    likeness = np.fft.irfft(power)[:frames]
    beat = 60.0 * rate / tempos
    frame = np.arange(frames)
    return np.sum([weight * np.interp(lag * beat, frame, likeness) for lag, weight in weights.items()], axis=0)


def _pulses(onsets: Floats, rate: float, tempos: Floats) -> Floats:
    """The magnitude of the onsets' spectrum, over bands, at the PULSES of every tempo, summed."""
    size = max(SPECTRUM_SIZE, 1 << (2 * len(onsets)).bit_length())
    spectrum = np.fft.rfft(onsets * np.hanning(len(onsets))[:, None], size, axis=0)
    strength = np.sqrt(np.square(np.abs(spectrum)).sum(axis=1))
    frequencies = np.fft.rfftfreq(size, 1.0 / rate)
    return np.sum([np.interp(pulse * tempos / 60.0, frequencies, strength) for pulse in PULSES], axis=0)


def _refined_peak(score: Floats) -> float:
    """The position of the highest point of a curve, between its samples."""
    top = int(np.argmax(score))
    if not 0 < top < len(score) - 1:
        return float(top)
    before, here, after = score[top - 1 : top + 2]
    bend = before - 2.0 * here + after
    return top + (0.5 * (before - after) / bend if bend < 0.0 else 0.0)


def _correlations(chroma: Floats, notes: tuple[int, ...]) -> Floats:
    """Correlation of a chroma (12,) with a set of notes above every tonic, (12,)."""
    spread = chroma - chroma.mean()
    length = float(np.linalg.norm(spread))
    return _profiles(notes) @ spread / length if length else np.zeros(12)


@lru_cache(maxsize=8)
def _profiles(notes: tuple[int, ...]) -> Floats:
    """Rows (12, 12): the notes above every tonic, mean 0 and length 1."""
    one = np.isin(np.arange(12), notes) - len(notes) / 12.0
    return np.stack([np.roll(one, tonic) for tonic in range(12)]) / float(np.linalg.norm(one))
