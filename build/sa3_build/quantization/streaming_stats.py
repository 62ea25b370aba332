"""What the elements of a tensor amount to, and what E4M3 would lose of them; a row at a time, keeping none."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sa3_build.e4m3 import quantized

NEAR_AMAX = 0.5  # of amax; a channel that reaches it helps to set the scale


@dataclass(frozen=True)
class Moments:
    """Count, mean and the sums of the 2nd to 4th power of the deviation from it, in fp64.

    Deviations are taken in a pass of their own and merged as Pebay (2008) does, so nothing cancels.
    """

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> Moments:
        """Of all elements of an array."""
        wide = values.astype(np.float64).reshape(-1)
        mean = float(wide.mean())
        wide -= mean
        square = wide * wide
        return cls(wide.size, mean, float(square.sum()), float(square @ wide), float(square @ square))

    def merged(self, other: Moments) -> Moments:
        """Of the elements of both."""
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
        return Moments(n, self.mean + d * b / n, second, third, fourth)

    @property
    def rms(self) -> float:
        """Root of the mean square, the mean included."""
        return math.sqrt(self.second / self.count + self.mean**2)

    @property
    def kurtosis(self) -> float:
        """Plain, not excess: 3 for a Gaussian; NaN for a constant."""
        return self.count * self.fourth / self.second**2 if self.second else math.nan


@dataclass(frozen=True)
class Statistics:
    """One activation at one sigma, over every element of `rows` rows.

    amax: the largest |x|. crest: amax / rms; NaN for zeros. kurtosis: plain, 3 for a Gaussian; NaN for a constant.
    channel_share: the share of channels (last axis) whose own largest |x| is within a factor 2 of amax; 1/C when one
    channel sets the scale of all, 1 when none stands out. underflow: the share of nonzero elements whose nearest E4M3
    value is zero at the recipe's scale, which has seen every sigma.
    """

    sigma: float
    rows: int
    amax: float
    rms: float
    crest: float
    kurtosis: float
    channel_share: float
    underflow: float


class Tally:
    """One activation at one sigma, a row at a time; keeps a few numbers and one a channel, never a row."""

    def __init__(self, scale: np.ndarray) -> None:
        self._scale = scale
        self._moments = Moments()
        self._channels = np.zeros(1, np.float32)
        self._rows = self._nonzero = self._lost = 0

    def add(self, values: np.ndarray) -> None:
        """Count one row, channels last. Raises ValueError, and counts nothing, when it is not finite."""
        single = values.astype(np.float32).reshape(-1, values.shape[-1])  # NumPy has no fast fp16 arithmetic
        magnitudes = np.abs(single)
        channels = magnitudes.max(axis=0)
        if not np.isfinite(channels).all():
            raise ValueError("NaN or infinity")
        self._channels = np.maximum(self._channels, channels)
        self._moments = self._moments.merged(Moments.of(single))
        self._nonzero += int(np.count_nonzero(single))
        small = magnitudes[(magnitudes > 0) & (magnitudes < self._scale)]  # from one scale up all round to 1 or more
        self._lost += int(np.count_nonzero(quantized(small, self._scale, axis=0) == 0))
        self._rows += 1

    def statistics(self, sigma: float) -> Statistics:
        """What the rows so far amount to; at least one."""
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
