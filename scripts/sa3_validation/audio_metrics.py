"""How far apart two sounds are, in figures that each stand for something that is heard."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from sa3_trt_core.shapes import SAMPLE_RATE
from sa3_validation.spectra import Floats, chroma, mono, onset_strength, spectra

RMS_SECONDS = 0.05  # a window of the RMS curve
FLOOR_DB = -60.0  # below full scale: what counts as silence, and the floor of the RMS curve
FULL_SCALE = 0.999  # from here on a sample counts as clipped
SIZES = (512, 2048, 8192)  # samples: windows of the spectral distance
SPECTRAL_FLOOR_DB = 80.0  # below the loudest point of the reference: quieter is not compared


@dataclass(frozen=True)
class Heard:
    """One sound: loudness in LUFS (None: too quiet or too short), shares of clipped samples and of silent windows."""

    loudness: float | None
    clipped: float
    silent: float


@dataclass(frozen=True)
class SoundApart:
    """A sound against its reference.

    `rms`, `chroma`, `onsets`: correlation of the loudness curve, of the notes, of what begins when; 1 is the same.
    `spectral` in dB: mean difference of the levels of all points, over three resolutions. `loudness` in LU: how much
    louder it is; `clipped` and `silent`: how much larger those shares are. None where neither sound gives a figure.
    """

    rms: float | None
    spectral: float
    chroma: float | None
    onsets: float | None
    loudness: float | None
    clipped: float
    silent: float


def hear(samples: np.ndarray) -> Heard:
    """One sound, fp32 (N, 2)."""
    silent = rms_curve(samples) <= FLOOR_DB
    return Heard(loudness_of(samples), float((np.abs(samples) >= FULL_SCALE).mean()), float(silent.mean()))


def sound_apart(reference: np.ndarray, candidate: np.ndarray) -> SoundApart:
    """How far a sound is from its reference, both fp32 (N, 2) and of one length; exact when they are equal."""
    if np.array_equal(reference, candidate):
        return SoundApart(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0)
    first, second = hear(reference), hear(candidate)
    sides = [mono(side) for side in (reference, candidate)]
    louder = None if first.loudness is None or second.loudness is None else second.loudness - first.loudness
    return SoundApart(
        rms=correlation(rms_curve(reference), rms_curve(candidate)),
        spectral=spectral_distance(*sides),
        chroma=correlation(*(chroma(side, SAMPLE_RATE)[0] for side in sides)),
        onsets=correlation(*(onset_strength(side, SAMPLE_RATE)[0].sum(axis=1) for side in sides)),
        loudness=louder,
        clipped=second.clipped - first.clipped,
        silent=second.silent - first.silent,
    )


def rms_curve(samples: np.ndarray) -> Floats:
    """Level in dB below full scale of every window, not under the floor."""
    width = round(RMS_SECONDS * SAMPLE_RATE)
    count = max(1, len(samples) // width)
    power = np.square(samples[: count * width].astype(np.float64)).reshape(count, -1).mean(axis=1)
    level: Floats = np.maximum(10.0 * np.log10(np.maximum(power, 1e-12)), FLOOR_DB)
    return level


def spectral_distance(reference: Floats, candidate: Floats) -> float:
    """Mean absolute difference in dB of the levels at every time and frequency where one sounds, mean over SIZES.

    Levels more than 80 dB below the reference's loudest point count as that, and as silence: nobody hears them.
    """
    found = []
    for size in SIZES:
        levels = [spectra(side, size, size // 4) for side in (reference, candidate)]
        floor = max(float(levels[0].max()) * 10 ** (-SPECTRAL_FLOOR_DB / 20), 1e-9)
        first, second = (20.0 * np.log10(np.maximum(level, floor)) for level in levels)
        sounding = np.maximum(levels[0], levels[1]) > floor
        found.append(float(np.abs(first - second)[sounding].mean()) if sounding.any() else 0.0)
    return float(np.mean(found))


def loudness_of(samples: np.ndarray) -> float | None:
    """Integrated loudness in LUFS (ITU-R BS.1770, by pyloudnorm); None for silence and for less than 0.4 s."""
    import pyloudnorm

    meter = pyloudnorm.Meter(SAMPLE_RATE)
    if len(samples) < meter.block_size * SAMPLE_RATE:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a logarithm of nothing
        level = float(meter.integrated_loudness(samples.astype(np.float64)))
    return level if np.isfinite(level) else None


def correlation(first: Floats, second: Floats) -> float | None:
    """Pearson's, of all values; None where one side is constant."""
    spreads = [side - side.mean() for side in (first, second)]
    length = float(np.linalg.norm(spreads[0]) * np.linalg.norm(spreads[1]))
    return float(np.vdot(*spreads) / length) if length else None
