"""Features of a sound and of its latent, for the two-sample test.

The features are the usual ones of music information retrieval, computed by librosa and pyloudnorm. Each belongs to a
group named for a property of the sound.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_trt_core.shapes import SAMPLE_RATE

Floats = NDArray[np.float64]
WINDOW, HOP = 2048, 512  # samples: 46 ms every 12 ms
MEL_BANDS = 32
SILENCE_LUFS = -70.0  # the absolute gate of ITU-R BS.1770: a sound below it has no loudness
FLOOR_DB = -80.0  # of mel levels, below full scale
ROLLOFF = 0.85  # share of the power below the rolloff frequency

TIMBRE, NOTES, RHYTHM, LOUDNESS, BRIGHTNESS, STEREO, LATENT, EMBEDDING = (
    "timbre", "notes", "rhythm", "loudness", "brightness", "stereo", "latent", "embedding",
)  # fmt: skip
PITCHES = 12
GROUPS = (TIMBRE, NOTES, RHYTHM, LOUDNESS, BRIGHTNESS, STEREO, LATENT, EMBEDDING)


@dataclass(frozen=True)
class Features:
    """Named features of one sound in a fixed order; `groups` has the group of each."""

    names: tuple[str, ...]
    groups: tuple[str, ...]
    values: Floats


@dataclass(frozen=True)
class Spectrogram:
    """A sound over time, T frames HOP samples apart: mel `levels` (MEL_BANDS, T) in dB below full scale, `pitches`
    (PITCHES, T) as shares of the strongest, `flatness` (T,) and `rolloff` (T,) as base-10 and base-2 logarithms.
    """

    levels: Floats
    pitches: Floats
    flatness: Floats
    rolloff: Floats


def features_of(
    samples: NDArray[Any], latent: NDArray[Any] | None = None, embedding: Floats | None = None,
    spectrogram: Spectrogram | None = None,
) -> Features:  # fmt: skip
    """Return features of a sound (N, 2) in [-1, 1] at 44.1 kHz, of its latent (256, L), and an embedding (D,)
    unchanged.

    Mean and deviation over time of every mel band in dB, of every pitch class, of the onset envelope, of spectral
    flatness and rolloff; loudness, loudness range and the level between the stereo sides; mean and log deviation of
    every latent channel. `spectrogram` is the sound's, where the caller has it. Raises ValueError for another shape or
    a sound shorter than one window.
    """
    sound = _checked(samples)
    by_group: dict[str, dict[str, float]] = {
        **_spectral(spectrogram or spectrogram_of(sound)),
        LOUDNESS: _loudness(sound),
        STEREO: {"side level": _level(sound[:, 0] - sound[:, 1]) - _level(sound[:, 0] + sound[:, 1])},
    }
    if latent is not None:
        by_group[LATENT] = _latent(np.asarray(latent, np.float64))
    if embedding is not None:
        by_group[EMBEDDING] = {f"embedding {i}": float(value) for i, value in enumerate(np.ravel(embedding))}
    return _flat(by_group)


def _flat(by_group: Mapping[str, Mapping[str, float]]) -> Features:
    order = [(group, name) for group in GROUPS for name in by_group.get(group, {})]
    return Features(
        names=tuple(name for _, name in order),
        groups=tuple(group for group, _ in order),
        values=np.asarray([by_group[group][name] for group, name in order], np.float64),
    )


def _checked(samples: NDArray[Any]) -> Floats:
    """Return samples in fp64. Raises ValueError for another shape, too few of them, and values that are not finite."""
    sound = np.asarray(samples, np.float64)
    if sound.ndim != 2 or sound.shape[1] != 2 or len(sound) < WINDOW:
        raise ValueError(f"expected samples (N, 2) with N >= {WINDOW}, got {sound.shape}")
    if not np.isfinite(sound).all():
        raise ValueError("the samples are not finite")
    return sound


def spectrogram_of(samples: NDArray[Any]) -> Spectrogram:
    """Compute the curves of a sound (N, 2) with librosa. Raises ValueError as `features_of` does."""
    import librosa

    mono = _checked(samples).mean(axis=1)
    magnitude = np.abs(librosa.stft(mono, n_fft=WINDOW, hop_length=HOP))
    power = np.square(magnitude)
    # A sine of amplitude 1 has a peak of WINDOW / 4 in a Hann window, so this refers levels to full scale.
    mel = librosa.feature.melspectrogram(S=power / (WINDOW / 4) ** 2, sr=SAMPLE_RATE, n_mels=MEL_BANDS)
    levels = 10.0 * np.log10(np.maximum(mel, 10.0 ** (FLOOR_DB / 10.0)))
    # A fixed tuning: an estimate would add a difference between otherwise equal sounds.
    pitches = librosa.feature.chroma_stft(S=power, sr=SAMPLE_RATE, n_fft=WINDOW, hop_length=HOP, tuning=0.0)
    flatness = np.log10(np.maximum(librosa.feature.spectral_flatness(S=magnitude)[0], 1e-10))
    rolloff = librosa.feature.spectral_rolloff(S=magnitude, sr=SAMPLE_RATE, roll_percent=ROLLOFF)[0]
    return Spectrogram(levels, pitches, flatness, np.log2(np.maximum(rolloff, 20.0)))


def onset_envelope(levels: NDArray[Any]) -> Floats:
    """Return the onset strength (T,) of mel levels (MEL_BANDS, T) in dB: librosa's spectral flux."""
    from librosa.onset import onset_strength

    return np.asarray(onset_strength(S=levels, sr=SAMPLE_RATE, hop_length=HOP), np.float64)


def _spectral(curves: Spectrogram) -> dict[str, dict[str, float]]:
    """Return timbre, notes, rhythm and brightness of a spectrogram."""
    onsets = onset_envelope(curves.levels)
    brightness = {"flatness": curves.flatness, "rolloff": curves.rolloff}
    return {
        TIMBRE: _moments({f"mel band {i}": row for i, row in enumerate(curves.levels)}),
        NOTES: _moments({f"pitch class {i}": row for i, row in enumerate(curves.pitches)}),
        RHYTHM: {
            **_moments({"onsets": onsets}),
            "strongest onset": float(onsets.max()),
            **{f"onset period {i}": value for i, value in enumerate(_periodicity(onsets))},
        },
        BRIGHTNESS: _moments(brightness),
    }


def _periodicity(onsets: Floats) -> list[float]:
    """Return the autocorrelation of the onset envelope at the beats of 60, 80, ..., 180 BPM, as shares of its power."""
    import librosa

    centred = onsets - onsets.mean()
    lags = [round(60.0 / tempo * SAMPLE_RATE / HOP) for tempo in range(60, 181, 20)]
    autocorrelation = librosa.autocorrelate(centred, max_size=max(lags) + 1)
    if autocorrelation[0] <= 0.0:
        return [0.0] * len(lags)
    return [float(autocorrelation[lag] / autocorrelation[0]) if lag < len(autocorrelation) else 0.0 for lag in lags]


def _loudness(sound: Floats) -> dict[str, float]:
    """Return integrated loudness in LUFS (ITU-R BS.1770) and loudness range in LU (EBU Tech 3342), by pyloudnorm.

    The range is 0 LU for silence and for sounds shorter than its 3 s window.
    """
    import pyloudnorm

    meter = pyloudnorm.Meter(SAMPLE_RATE)
    level, spread = SILENCE_LUFS, 0.0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # logarithm of zero, and gates that reject all blocks
        if len(sound) >= meter.block_size * SAMPLE_RATE:
            level = max(float(meter.integrated_loudness(sound)), SILENCE_LUFS)
        if len(sound) >= 3 * SAMPLE_RATE:
            spread = float(meter.loudness_range(sound))
    return {"loudness": level if np.isfinite(level) else SILENCE_LUFS, "range": spread if np.isfinite(spread) else 0.0}


def _latent(latent: Floats) -> dict[str, float]:
    if latent.ndim != 2:
        raise ValueError(f"expected a latent (256, L), got {latent.shape}")
    deviation = np.log(np.maximum(latent.std(axis=1), 1e-6))
    return {
        **{f"mean of channel {i}": float(value) for i, value in enumerate(latent.mean(axis=1))},
        **{f"spread of channel {i}": float(value) for i, value in enumerate(deviation)},
    }


def _moments(rows: Mapping[str, Floats]) -> dict[str, float]:
    return {
        **{f"mean of {name}": float(row.mean()) for name, row in rows.items()},
        **{f"spread of {name}": float(row.std()) for name, row in rows.items()},
    }


def _level(samples: Floats) -> float:
    """Return the level in dB relative to full scale, clamped to FLOOR_DB."""
    return max(10.0 * float(np.log10(max(np.square(samples).mean(), 1e-12))), FLOOR_DB)
