"""Spectra, onset strength and chroma of a sound, and its spectrogram."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sa3_trt_core.artifacts import files
from sa3_trt_core.shapes import SAMPLE_RATE

Floats = NDArray[np.float64]
BAND_EDGES = (20.0, 120.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0, 16_000.0)  # Hz
QUIET = 1e-6  # inaudible magnitude; a clip below it is silent

ONSET_SECONDS, ONSET_HOPS = 0.023, 4  # window of the spectra, and windows that overlap
COMPRESSION = 100.0  # of magnitudes, before the logarithm
CHROMA_SECONDS, CHROMA_HOPS = 0.186, 4
CHROMA_RANGE = (60.0, 2000.0)  # Hz: the notes, not the cymbals

PICTURE_WINDOW, PICTURE_HOP = 4096, 512  # samples: 86 columns a second
PICTURE_ROWS, PICTURE_RANGE = 240, (40.0, 16_000.0)  # Hz, bottom to top, evenly spaced in pitch
PICTURE_DECIBELS = 80.0  # from the brightest colour down to black
COLOURS = ((0, 0, 0), (60, 15, 110), (170, 40, 110), (245, 120, 40), (255, 250, 190))  # evenly spaced, dark to bright


def spectrogram_png(path: Path, samples: ArrayLike, sample_rate: float = SAMPLE_RATE) -> None:
    """Write the spectrogram of a clip as a PNG file, atomically."""
    files.write_atomic_bytes(path, spectrogram(samples, sample_rate))


def spectrogram(samples: ArrayLike, sample_rate: float = SAMPLE_RATE, hop: int = PICTURE_HOP) -> bytes:
    """Return a PNG picture of a clip: time to the right, pitch upwards, loudness from black to pale yellow.

    samples (N, 2), (2, N) or (N,). Levels are in dB below the loudest point, a power mean over each row's frequencies.
    """
    from matplotlib import image
    from matplotlib.colors import LinearSegmentedColormap

    power = np.square(spectra(mono(samples), PICTURE_WINDOW, hop))
    below = np.pad(np.cumsum(power, axis=1), ((0, 0), (1, 0)))  # power below the lower edge of every bin
    edges = np.geomspace(*PICTURE_RANGE, PICTURE_ROWS + 1) * PICTURE_WINDOW / sample_rate + 0.5
    bins = np.arange(below.shape[1])
    rows = np.stack([np.diff(np.interp(edges, bins, frame)) / np.diff(edges) for frame in below], axis=1)
    levels = 10.0 * np.log10(np.maximum(rows, QUIET**4) / max(float(rows.max()), QUIET**2))
    shades = np.round(255.0 * np.clip(1.0 + levels / PICTURE_DECIBELS, 0.0, 1.0)).astype(np.uint8)
    picture = io.BytesIO()
    colours = LinearSegmentedColormap.from_list("loudness", np.divide(COLOURS, 255.0))
    image.imsave(picture, shades, cmap=colours, vmin=0, vmax=255, origin="lower", format="png")
    return picture.getvalue()


def spectra(mono: Floats, size: int, hop: int) -> Floats:
    """Return magnitudes (frames, size / 2 + 1) of Hann windows every `hop` samples, the first centred on the first
    sample.

    A sine of amplitude 1 has a peak of about 1.
    """
    padded = np.pad(mono, (size // 2, size // 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop]
    return np.abs(np.fft.rfft(windows * np.hanning(size), axis=1)) / (size / 4)


def mono(samples: ArrayLike) -> Floats:
    """Return the mean over channels; the shorter axis is the channel axis."""
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"expected samples (N, 2), (2, N) or (N,), got {array.shape}")
    return array if array.ndim == 1 else array.mean(axis=int(np.argmin(array.shape)))


def onset_strength(mono: Floats, sample_rate: float) -> tuple[Floats, float]:
    """Return onset strength (frames, bands) of every band that is not silent, and frames per second.

    Each band has mean 0 and deviation 1 over the clip.
    """
    size = nearest_window(ONSET_SECONDS, sample_rate)
    hop = size // ONSET_HOPS
    increase = np.maximum(np.diff(np.log1p(COMPRESSION * spectra(mono, size, hop)), axis=0), 0.0)
    edges = np.searchsorted(np.fft.rfftfreq(size, 1.0 / sample_rate), BAND_EDGES)
    bands = [increase[:, low:high].mean(axis=1) for low, high in pairwise(edges) if high > low]
    audible = [standard(band) for band in bands if band.std() > QUIET]
    return np.stack(audible, axis=1) if audible else np.zeros((len(increase), 1)), sample_rate / hop


def standard(values: Floats) -> Floats:
    """Return the values scaled to mean 0 and deviation 1."""
    return (values - values.mean()) / values.std()


def chroma(mono: Floats, sample_rate: float) -> tuple[Floats, float]:
    """Return the magnitude of every pitch class, C first, in every frame (frames, 12), and frames per second.

    Only local peaks of the spectrum are used, at their interpolated frequency, weighted down with their distance from a
    tempered note: drums have few peaks, and those are out of tune.
    """
    size = nearest_window(CHROMA_SECONDS, sample_rate)
    hop = size // CHROMA_HOPS
    low, high = (int(edge * size / sample_rate) for edge in CHROMA_RANGE)
    levels = spectra(mono, size, hop)[:, low : high + 3]
    before, here, after = (np.log(levels[:, i : levels.shape[1] - 2 + i] + QUIET) for i in range(3))
    frame, column = np.nonzero((here > before) & (here >= after) & (levels[:, 1:-1] > QUIET))
    left, middle, right = (side[frame, column] for side in (before, here, after))
    offset = 0.5 * (left - right) / (left - 2.0 * middle + right)
    pitch = 69.0 + 12.0 * np.log2((low + 1 + column + offset) * sample_rate / size / 440.0)
    nearest = np.round(pitch)
    weight: Floats = levels[frame, column + 1] * np.cos(np.pi * (pitch - nearest))
    cell = frame * 12 + nearest.astype(np.int64) % 12
    magnitudes = np.zeros(12 * len(levels))
    np.add.at(magnitudes, cell, weight)
    return magnitudes.reshape(-1, 12), sample_rate / hop


def nearest_window(seconds: float, sample_rate: float) -> int:
    """Return the power of two nearest to a length in samples."""
    return 1 << round(np.log2(seconds * sample_rate))
