"""How near a clip is to another, and how loud it is in each band, with nothing but NumPy."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from sa3_validation.spectra import BAND_EDGES, PICTURE_WINDOW, mono, spectra


def si_sdr(reference: ArrayLike, estimate: ArrayLike) -> float:
    """Scale-invariant signal-to-distortion ratio in dB of two arrays of one shape, taken as vectors.

    10 log10(|a s|^2 / |a s - e|^2) with a = <e, s> / |s|^2; inf where nothing is left over, -inf for orthogonal or
    silent estimates, NaN for a silent reference. Source: Le Roux et al. 2019, "SDR - half-baked or well done?".
    """
    wanted, given = (np.asarray(side, dtype=np.float64).ravel() for side in (reference, estimate))
    if wanted.shape != given.shape:
        raise ValueError(f"{wanted.size} samples against {given.size}")
    power = float(wanted @ wanted)
    if power == 0.0:
        return float("nan")
    target = (float(given @ wanted) / power) * wanted
    with np.errstate(divide="ignore"):
        kept, rest = np.square(target).sum(), np.square(given - target).sum()
        return float("-inf") if kept == 0.0 else float(10.0 * (np.log10(kept) - np.log10(rest)))


def band_levels(samples: ArrayLike, sample_rate: float) -> dict[str, float]:
    """Level in dB of a clip in bands from BAND_EDGES, and "all": what a dull or soft copy lacks.

    samples (N, 2), (2, N) or (N,); 0 dB is a sine of amplitude 1; silence is -inf.
    """
    power = np.square(spectra(mono(samples), PICTURE_WINDOW, PICTURE_WINDOW // 2)).mean(axis=0)
    edges = np.searchsorted(np.fft.rfftfreq(PICTURE_WINDOW, 1.0 / sample_rate), BAND_EDGES)
    bands = {f"{low:g}-{high:g} Hz": (first, last) for (low, high), (first, last) in
             zip(pairwise(BAND_EDGES), pairwise(edges), strict=True)}  # fmt: skip
    bands["all"] = (int(edges[0]), int(edges[-1]))
    with np.errstate(divide="ignore"):
        # A sine's power lies in about 1.5 bins of a Hann window.
        return {name: float(10.0 * np.log10(power[first:last].sum() / 1.5)) for name, (first, last) in bands.items()}
