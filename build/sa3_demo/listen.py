"""Distance between two clips and level per frequency band, using only NumPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from sa3_validation.spectra import BAND_EDGES, PICTURE_WINDOW, mono, spectra


def si_sdr(reference: ArrayLike, estimate: ArrayLike) -> float:
    """Return the scale-invariant signal-to-distortion ratio in dB of two arrays of one shape, taken as vectors.

    10 log10(|a s|^2 / |a s - e|^2) with a = <e, s> / |s|^2; inf without distortion, -inf for orthogonal or silent
    estimates, NaN for a silent reference. Source: Le Roux et al. 2019, "SDR - half-baked or well done?".
    """
    target_samples, estimate_samples = (np.asarray(side, dtype=np.float64).ravel() for side in (reference, estimate))
    if target_samples.shape != estimate_samples.shape:
        raise ValueError(f"{target_samples.size} samples against {estimate_samples.size}")
    power = float(target_samples @ target_samples)
    if power == 0.0:
        return float("nan")
    target = (float(estimate_samples @ target_samples) / power) * target_samples
    with np.errstate(divide="ignore"):
        signal, distortion = np.square(target).sum(), np.square(estimate_samples - target).sum()
        return float("-inf") if signal == 0.0 else float(10.0 * (np.log10(signal) - np.log10(distortion)))


def band_levels(samples: ArrayLike, sample_rate: float) -> dict[str, float]:
    """Return the level in dB of a clip in bands from BAND_EDGES, and of "all" bands.

    samples (N, 2), (2, N) or (N,); 0 dB is a sine of amplitude 1; silence is -inf.
    """
    power = np.square(spectra(mono(samples), PICTURE_WINDOW, PICTURE_WINDOW // 2)).mean(axis=0)
    edges = np.searchsorted(np.fft.rfftfreq(PICTURE_WINDOW, 1.0 / sample_rate), BAND_EDGES)
    bands = {f"{low:g}-{high:g} Hz": (first, last) for (low, high), (first, last) in
             zip(pairwise(BAND_EDGES), pairwise(edges), strict=True)}  # fmt: skip
    bands["all"] = (int(edges[0]), int(edges[-1]))
    with np.errstate(divide="ignore"):
        # The power of a sine is spread over about 1.5 bins of a Hann window.
        return {name: float(10.0 * np.log10(power[first:last].sum() / 1.5)) for name, (first, last) in bands.items()}
