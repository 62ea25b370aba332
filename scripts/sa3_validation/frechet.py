"""Fréchet distance between two sets of feature vectors, each taken as a Gaussian."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def frechet_distance(first: Floats, second: Floats) -> float:
    """Return the squared 2-Wasserstein distance of Gaussians fitted to two sets of rows (n, D) and (m, D), n and m >=
    2.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982). The trace of the root is computed as the sum
    of the singular values of C1^(1/2) C2^(1/2), which avoids the root of a non-symmetric matrix. Sets with fewer rows
    than features give singular covariances: the value is then biased and comparable only with values of the same sizes.
    Raises ValueError for other shapes and for values that are not finite.
    """
    features = [np.asarray(array, np.float64) for array in (first, second)]
    if any(array.ndim != 2 or len(array) < 2 for array in features) or features[0].shape[1] != features[1].shape[1]:
        raise ValueError(f"expected two (n, D) arrays of one width, got {features[0].shape} and {features[1].shape}")
    if not all(np.isfinite(array).all() for array in features):
        raise ValueError("the features are not finite")
    shift = float(np.square(features[0].mean(axis=0) - features[1].mean(axis=0)).sum())
    # C = X^T X of the centred rows X / sqrt(n - 1): the singular values of C1^(1/2) C2^(1/2) are those of X1 X2^T.
    centred = [(array - array.mean(axis=0)) / np.sqrt(len(array) - 1) for array in features]
    spread = sum(float(np.square(array).sum()) for array in centred)
    common = float(np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum())
    return max(shift + spread - 2.0 * common, 0.0)
