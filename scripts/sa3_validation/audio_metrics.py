"""Distances between two sounds: loudness curve, spectrum, chroma, onsets, loudness, clipping and silence."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation.spectra import Floats, chroma, mono, onset_strength, spectra

RMS_SECONDS = 0.05  # a window of the RMS curve
FLOOR_DB = -60.0  # relative to full scale: threshold of silence, and the floor of the RMS curve
FULL_SCALE = 0.999  # threshold of clipping
SIZES = (512, 2048, 8192)  # samples: windows of the spectral distance
SPECTRAL_FLOOR_DB = 80.0  # below the loudest point of the reference: quieter points are not compared


@dataclass(frozen=True)
class SoundLevels:
    """Levels of one sound: loudness in LUFS (None: too quiet or too short), shares of clipped samples and of silent
    windows.
    """

    loudness: float | None
    clipped: float
    silent: float


@dataclass(frozen=True)
class AudioDistance:
    """Distance of a sound from its reference.

    `rms`, `chroma`, `onsets`: correlation of the loudness curve, of pitch classes, of onset strength; 1 is equal.
    `spectral` in dB: mean absolute difference of levels over three resolutions. `loudness` in LU, `clipped` and
    `silent` as shares: candidate minus reference. None where neither sound gives a figure.
    """

    rms: float | None
    spectral: float
    chroma: float | None
    onsets: float | None
    loudness: float | None
    clipped: float
    silent: float


def sound_levels(samples: np.ndarray) -> SoundLevels:
    """Return the levels of one sound, fp32 (N, 2)."""
    silent = rms_curve(samples) <= FLOOR_DB
    return SoundLevels(loudness_of(samples), float((np.abs(samples) >= FULL_SCALE).mean()), float(silent.mean()))


def audio_distance(reference: np.ndarray, candidate: np.ndarray) -> AudioDistance:
    """Return the distance of a sound from its reference, both fp32 (N, 2) of one length; exact when they are equal."""
    if np.array_equal(reference, candidate):
        return AudioDistance(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    first, second = sound_levels(reference), sound_levels(candidate)
    monos = [mono(samples) for samples in (reference, candidate)]
    louder = None if first.loudness is None or second.loudness is None else second.loudness - first.loudness
    return AudioDistance(
        rms=correlation(rms_curve(reference), rms_curve(candidate)),
        spectral=spectral_distance(*monos),
        chroma=correlation(*(chroma(samples, SAMPLE_RATE)[0] for samples in monos)),
        onsets=correlation(*(onset_strength(samples, SAMPLE_RATE)[0].sum(axis=1) for samples in monos)),
        loudness=louder,
        clipped=second.clipped - first.clipped,
        silent=second.silent - first.silent,
    )


def rms_curve(samples: np.ndarray) -> Floats:
    """Return the level of every window in dB relative to full scale, clamped to FLOOR_DB."""
    width = round(RMS_SECONDS * SAMPLE_RATE)
    count = max(1, len(samples) // width)
    power = np.square(samples[: count * width].astype(np.float64)).reshape(count, -1).mean(axis=1)
    level: Floats = np.maximum(10.0 * np.log10(np.maximum(power, 1e-12)), FLOOR_DB)
    return level


def spectral_distance(reference: Floats, candidate: Floats) -> float:
    """Return the mean absolute level difference in dB over all audible times and frequencies, averaged over SIZES.

    Levels more than 80 dB below the reference's loudest point are raised to that level. Points where both are there
    are left out: they are inaudible.
    """
    differences = []
    for size in SIZES:
        levels = [spectra(side, size, size // 4) for side in (reference, candidate)]
        floor = max(float(levels[0].max()) * 10 ** (-SPECTRAL_FLOOR_DB / 20), 1e-9)
        first, second = (20.0 * np.log10(np.maximum(level, floor)) for level in levels)
        sounding = np.maximum(levels[0], levels[1]) > floor
        differences.append(float(np.abs(first - second)[sounding].mean()) if sounding.any() else 0.0)
    return float(np.mean(differences))


def loudness_of(samples: np.ndarray) -> float | None:
    """Return the integrated loudness in LUFS (ITU-R BS.1770, by pyloudnorm); None for silence and below 0.4 s."""
    import pyloudnorm

    meter = pyloudnorm.Meter(SAMPLE_RATE)
    if len(samples) < meter.block_size * SAMPLE_RATE:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # logarithm of 0 for silence
        level = float(meter.integrated_loudness(samples.astype(np.float64)))
    return level if np.isfinite(level) else None


def correlation(first: Floats, second: Floats) -> float | None:
    """Return Pearson's correlation of all values; None where one array is constant."""
    spreads = [side - side.mean() for side in (first, second)]
    length = float(np.linalg.norm(spreads[0]) * np.linalg.norm(spreads[1]))
    return float(np.vdot(*spreads) / length) if length else None
