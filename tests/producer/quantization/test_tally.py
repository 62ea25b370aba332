"""Statistics of tensors with known values; they do not depend on the split into rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from sa3_build.quantization.streaming_stats import CentralMoments, RunningStats

ONE = np.float16(1.0)


def tallied(*rows: np.ndarray, scale: np.float16 = ONE) -> RunningStats:
    tally = RunningStats(np.asarray(scale))
    for row in rows:
        tally.add(row)
    return tally


@pytest.mark.parametrize(("outlier", "share"), [(100.0, 1 / 64), (2.1, 1 / 64), (2.0, 1.0), (1.0, 1.0)])
def test_channels_that_set_the_amax_are_counted(outlier: float, share: float) -> None:
    """Channels within a factor 2 of the amax are counted, the limit included."""
    row = np.ones((1, 8, 64), np.float16)
    row[0, 3, 5] = -outlier
    statistics = tallied(row).statistics(1.0)
    assert statistics.channel_share == share
    assert statistics.amax == float(np.float16(outlier))


def test_a_channel_is_an_outlier_over_all_rows() -> None:
    """Each row alone has one outlier channel; both together have two."""
    first, second = np.ones((2, 1, 4, 8), np.float16)
    first[..., 2], second[..., 6] = 10.0, 12.0
    assert tallied(first).statistics(1.0).channel_share == 1 / 8
    assert tallied(first, second).statistics(1.0).channel_share == 2 / 8


def test_kurtosis_is_plain() -> None:
    """3 for a Gaussian, 1.8 for a uniform, 1 for two values, about N for one spike among N zeros."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((1, 500, 64)).astype(np.float16) for _ in range(8)]
    assert tallied(*rows).statistics(1.0).kurtosis == pytest.approx(3.0, abs=0.05)
    flat = [rng.uniform(-1, 1, (1, 500, 64)).astype(np.float16) for _ in range(8)]
    assert tallied(*flat).statistics(1.0).kurtosis == pytest.approx(1.8, abs=0.02)
    coin = np.array([[[5.0, -5.0]]], np.float16)
    statistics = tallied(coin, coin).statistics(1.0)
    assert (statistics.kurtosis, statistics.rms, statistics.crest, statistics.rows) == (1.0, 5.0, 1.0, 2)
    spike = np.zeros((1, 10, 100), np.float16)
    spike[0, 0, 0] = 7.0
    assert tallied(spike).statistics(1.0).kurtosis == pytest.approx(1000, rel=0.01)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(1, 399), max_size=6), offset=st.sampled_from([0.0, -30.0, 2000.0]))
def test_moments_do_not_depend_on_how_rows_are_cut(cuts: list[int], offset: float) -> None:
    """Compare with long double over all values: an offset of 2000 deviations would ruin plain power sums."""
    values = (np.random.default_rng(3).gamma(2.0, size=400) + offset).astype(np.float32)
    merged = CentralMoments()
    for part in np.split(values, sorted(set(cuts))):
        merged = merged.merged(CentralMoments.of(part))
    whole = values.astype(np.longdouble)
    deviation = whole - whole.mean()
    assert merged.count == 400
    assert merged.rms == pytest.approx(float(np.sqrt((whole**2).mean())), rel=1e-12)
    assert merged.kurtosis == pytest.approx(float((deviation**4).mean() / (deviation**2).mean() ** 2), rel=1e-9)
    assert merged.third == pytest.approx(float((deviation**3).sum()), rel=1e-6)


def test_underflow_is_what_e4m3_rounds_to_zero() -> None:
    """E4M3's smallest value is 2^-9 scales: half of that is a tie and rounds to zero, the next number up does not."""
    scale = np.float16(2.0)
    tie = np.float16(2.0**-10 * 2.0)
    row = np.array([[[0.0, 0.0, tie, -tie, tie / 4, np.nextafter(tie, ONE), 1.0, -100.0]]], np.float16)
    assert tallied(row, scale=scale).statistics(1.0).underflow == 3 / 6
    assert tallied(row, np.ones_like(row), scale=scale).statistics(1.0).underflow == 3 / 14
    assert tallied(row, scale=np.float16(2.0**-14)).statistics(1.0).underflow == 0.0


def test_zeros_have_no_crest_and_no_kurtosis() -> None:
    statistics = tallied(np.zeros((1, 3, 4), np.float16)).statistics(1.0)
    assert (statistics.amax, statistics.rms, statistics.underflow) == (0.0, 0.0, 0.0)
    assert math.isnan(statistics.crest) and math.isnan(statistics.kurtosis)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_refused_and_not_counted(bad: float) -> None:
    good = np.ones((1, 2, 4), np.float16)
    tally = tallied(good)
    row = good.copy()
    row[0, 1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        tally.add(row)
    assert tally.statistics(1.0) == tallied(good).statistics(1.0)
