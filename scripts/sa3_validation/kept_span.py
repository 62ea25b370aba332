"""Features of an in-painting beside the sound that it was made from: how unlike what was to be kept it has become.

The sound alone cannot show whether a DiT keeps: one that ignores its local conditioning makes good music of the same
prompt. Whoever in-paints has both sounds, so both are compared, over the spans that are not made anew.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sa3_trt_core.shapes import SAMPLE_RATE, SAMPLES_PER_FRAME
from sa3_validation.cases import REGENERATED
from sa3_validation.sound_features import HOP, MEL_BANDS, onset_envelope

Floats = NDArray[np.float64]
KEPT = "kept"  # the group of these features
SEAM = SAMPLES_PER_FRAME / SAMPLE_RATE  # seconds beside a seam that are left out: a mask is rounded to latent frames
COUNT = MEL_BANDS + 3


def kept_frames(seconds: float, frames: int) -> NDArray[np.bool_]:
    """True (frames,) for the frames of a spectrogram that lie in what in-painting keeps, away from its seams.

    The first one always is: a sound of some tenths of a second may have no other.
    """
    times = np.arange(frames) * HOP / SAMPLE_RATE
    start, end = (share * seconds for share in REGENERATED)
    kept = (times < start - SEAM) | ((times > end + SEAM) & (times < seconds))
    kept[:1] = True
    return np.asarray(kept, np.bool_)


def kept_features(
    source: tuple[NDArray[np.floating], NDArray[np.floating]],
    made: tuple[NDArray[np.floating], NDArray[np.floating]],
    kept: NDArray[np.bool_],
) -> Floats:
    """Distances (COUNT,) of an in-painting from its source over the frames `kept`; each side is (levels, pitches).

    Mean absolute difference of every mel band in dB, mean difference of all bands in dB, mean cosine distance of the
    pitch classes, and 1 less the correlation of the onset envelopes (1 where one of them does not vary).
    """
    (levels, pitches), (made_levels, made_pitches) = ([np.asarray(part, np.float64) for part in side]
                                                      for side in (source, made))  # fmt: skip
    apart = (made_levels - levels)[:, kept]
    norms = np.linalg.norm(pitches, axis=0) * np.linalg.norm(made_pitches, axis=0)
    alike = (pitches * made_pitches).sum(axis=0) / np.maximum(norms, 1e-9)
    onsets = [onset_envelope(side)[kept] for side in (levels, made_levels)]
    return np.array([*np.abs(apart).mean(axis=1), apart.mean(), 1.0 - alike[kept].mean(), 1.0 - _correlation(*onsets)])


def kept_decibels(features: Floats) -> float:
    """Return the median over in-paintings, features (N, COUNT), of the absolute difference in dB, mean over bands."""
    return float(np.median(features[:, :MEL_BANDS].mean(axis=1)))


def _correlation(first: Floats, second: Floats) -> float:
    spread = [side - side.mean() for side in (first, second)]
    length = float(np.linalg.norm(spread[0]) * np.linalg.norm(spread[1]))
    return float(spread[0] @ spread[1]) / length if length > 1e-12 else 0.0
