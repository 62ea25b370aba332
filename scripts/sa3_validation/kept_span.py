"""Features of an in-painting against its source sound: distances over the spans to keep.

The in-painting alone does not show an error of the local conditioning: a DiT that ignores it generates plausible music
for the same prompt. So source and in-painting are compared over the spans that are not regenerated.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sa3_trt_core.shapes import SAMPLE_RATE, SAMPLES_PER_FRAME
from sa3_validation.cases import INPAINT_RANGE
from sa3_validation.sound_features import HOP, MEL_BANDS, onset_envelope

Floats = NDArray[np.float64]
KEPT = "kept"  # the group of these features
SEAM = SAMPLES_PER_FRAME / SAMPLE_RATE  # seconds beside a seam that are left out: a mask is rounded to latent frames
COUNT = MEL_BANDS + 3


def kept_frames(seconds: float, frames: int) -> NDArray[np.bool_]:
    """Return a mask (frames,), True for spectrogram frames in the spans that in-painting keeps, without the seams.

    The first frame is always True: a sound of some tenths of a second may have no further one.
    """
    times = np.arange(frames) * HOP / SAMPLE_RATE
    start, end = (share * seconds for share in INPAINT_RANGE)
    kept = (times < start - SEAM) | ((times > end + SEAM) & (times < seconds))
    kept[:1] = True
    return np.asarray(kept, np.bool_)


def kept_features(
    source: tuple[NDArray[np.floating], NDArray[np.floating]],
    made: tuple[NDArray[np.floating], NDArray[np.floating]],
    kept: NDArray[np.bool_],
) -> Floats:
    """Return distances (COUNT,) of an in-painting from its source over the frames `kept`; each is (levels, pitches).

    Mean absolute difference of every mel band in dB, mean difference of all bands in dB, mean cosine distance of the
    pitch classes, and 1 less the correlation of the onset envelopes (1 where one of them does not vary).
    """
    (levels, pitches), (made_levels, made_pitches) = ([np.asarray(part, np.float64) for part in side]
                                                      for side in (source, made))  # fmt: skip
    difference = (made_levels - levels)[:, kept]
    norms = np.linalg.norm(pitches, axis=0) * np.linalg.norm(made_pitches, axis=0)
    cosine = (pitches * made_pitches).sum(axis=0) / np.maximum(norms, 1e-9)
    onsets = [onset_envelope(side)[kept] for side in (levels, made_levels)]
    return np.array(
        [*np.abs(difference).mean(axis=1), difference.mean(), 1.0 - cosine[kept].mean(), 1.0 - _correlation(*onsets)]
    )


def kept_decibels(features: Floats) -> float:
    """Return the median over in-paintings, features (N, COUNT), of the absolute difference in dB, mean over bands."""
    return float(np.median(features[:, :MEL_BANDS].mean(axis=1)))


def _correlation(first: Floats, second: Floats) -> float:
    spread = [side - side.mean() for side in (first, second)]
    length = float(np.linalg.norm(spread[0]) * np.linalg.norm(spread[1]))
    return float(spread[0] @ spread[1]) / length if length > 1e-12 else 0.0
