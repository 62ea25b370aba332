"""Streaming statistics of an activation (amax, RMS, kurtosis, E4M3 underflow) in constant memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sa3_build.e4m3 import quantized

NEAR_AMAX = 0.5  # share of amax; a channel whose amax reaches it is counted in `channel_share`


@dataclass(frozen=True)
class CentralMoments:
    """Count, mean and central power sums of orders 2 to 4, in fp64.

    Deviations from the mean are computed in a separate pass and merged by Pebay's formulas (2008), which avoids
    cancellation.
    """

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> CentralMoments:
        """Return the moments of all elements of an array."""
        deviations = values.astype(np.float64).reshape(-1)
        mean = float(deviations.mean())
        deviations -= mean
        square = deviations * deviations
        return cls(deviations.size, mean, float(square.sum()), float(square @ deviations), float(square @ square))

    def merged(self, other: CentralMoments) -> CentralMoments:
        """Return the moments of the elements of both."""
        if not self.count or not other.count:
            return self if self.count else other
        a, b, n = self.count, other.count, self.count + other.count
        d = other.mean - self.mean
        second = self.second + other.second + d**2 * a * b / n
        third = self.third + other.third + d**3 * a * b * (a - b) / n**2
        third += 3 * d * (a * other.second - b * self.second) / n
        fourth = self.fourth + other.fourth + d**4 * a * b * (a * a - a * b + b * b) / n**3
        fourth += 6 * d**2 * (a * a * other.second + b * b * self.second) / n**2
        fourth += 4 * d * (a * other.third - b * self.third) / n
        return CentralMoments(n, self.mean + d * b / n, second, third, fourth)

    @property
    def rms(self) -> float:
        """Root of the mean square; the mean is included."""
        return math.sqrt(self.second / self.count + self.mean**2)

    @property
    def kurtosis(self) -> float:
        """Plain kurtosis, not excess: 3 for a Gaussian; NaN for a constant."""
        return self.count * self.fourth / self.second**2 if self.second else math.nan


@dataclass(frozen=True)
class Statistics:
    """Statistics of one activation at one sigma, over every element of `rows` rows.

    amax: the largest |x|. crest: amax / rms; NaN for zeros. kurtosis: plain, 3 for a Gaussian; NaN for a constant.
    channel_share: the share of channels (last axis) whose own amax is within a factor 2 of the tensor's; 1/C when one
    channel sets the scale of all, 1 when all are similar. underflow: the share of nonzero elements whose nearest E4M3
    value is zero at the recipe's scale, which covers every sigma.
    """

    sigma: float
    rows: int
    amax: float
    rms: float
    crest: float
    kurtosis: float
    channel_share: float
    underflow: float


class RunningStats:
    """Statistics of one activation at one sigma, updated row by row; stores a few numbers and one per channel."""

    def __init__(self, scale: np.ndarray) -> None:
        self._scale = scale
        self._moments = CentralMoments()
        self._channels = np.zeros(1, np.float32)
        self._rows = self._nonzero = self._lost = 0

    def add(self, values: np.ndarray) -> None:
        """Add one row, channels last. Raises ValueError, and adds nothing, when it is not finite."""
        fp32_values = values.astype(np.float32).reshape(-1, values.shape[-1])  # NumPy has no fast fp16 arithmetic
        magnitudes = np.abs(fp32_values)
        channels = magnitudes.max(axis=0)
        if not np.isfinite(channels).all():
            raise ValueError("NaN or infinity")
        self._channels = np.maximum(self._channels, channels)
        self._moments = self._moments.merged(CentralMoments.of(fp32_values))
        self._nonzero += int(np.count_nonzero(fp32_values))
        small = magnitudes[
            (magnitudes > 0) & (magnitudes < self._scale)
        ]  # values of at least one scale round to a code of 1 or more
        self._lost += int(np.count_nonzero(quantized(small, self._scale, axis=0) == 0))
        self._rows += 1

    def statistics(self, sigma: float) -> Statistics:
        """Return the statistics of the rows added so far; at least one is required."""
        amax, rms = float(self._channels.max()), self._moments.rms
        return Statistics(
            sigma,
            self._rows,
            amax,
            rms,
            amax / rms if rms else math.nan,
            self._moments.kurtosis,
            float((self._channels >= NEAR_AMAX * amax).mean()),
            self._lost / self._nonzero if self._nonzero else 0.0,
        )
