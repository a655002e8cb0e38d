"""Intervals of independent values."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from secondorder.errors import InputError
from studies.statistics import (
    Interval,
    geometric_interval,
    mean_interval,
    median_interval,
    ratio_interval,
)


def test_mean_interval_is_students_t() -> None:
    values = [1.0, 2.0, 4.0, 4.5]
    interval = mean_interval(values)
    reference = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((reference.low, reference.high))
    assert interval.estimate == pytest.approx(np.mean(values))
    assert interval.n == 4


def test_interval_covers_the_mean_at_its_confidence() -> None:
    generator = np.random.default_rng(0)
    covered = [(i := mean_interval(generator.normal(2.0, 1.0, 3))).low < 2.0 < i.high for _ in range(2000)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_ratio_interval_is_paired_and_geometric() -> None:
    a, b = np.array([2.0, 8.0, 32.0]), np.array([1.0, 4.0, 16.0])
    interval = ratio_interval(a, b)
    assert (interval.low, interval.estimate, interval.high) == pytest.approx((2.0, 2.0, 2.0))
    swapped = ratio_interval(b, [2.0, 6.0, 33.0])
    inverse = ratio_interval([2.0, 6.0, 33.0], b)
    assert (1 / swapped.high, 1 / swapped.estimate) == pytest.approx((inverse.low, inverse.estimate))


def test_without_an_interval_ends_are_not_finite() -> None:
    assert mean_interval([0.0, 0.02], (0.0, 1.0)) == replace(mean_interval([0.0, 0.02]), low=0.0)
    assert mean_interval([0.9, 1.0], (0.0, 1.0)).high == 1.0
    assert mean_interval([0.1], (0.0, 1.0)) == mean_interval([0.1]) == Interval(0.1, -math.inf, math.inf, 1)
    assert geometric_interval([1.0]) == Interval(1.0, 0.0, math.inf, 1)
    for found in (ratio_interval([0.1, 0.0], [1.0, 1.0]), ratio_interval([0.1, np.nan], [1.0, 1.0]), mean_interval([])):
        assert np.isnan([found.estimate, found.low, found.high]).all()


def test_words_for_tables() -> None:
    assert mean_interval([1.0, 1.5, 2.0]).short == "1.5 [0.258, 2.74]"
    assert (mean_interval([0.1]).short, mean_interval([]).short) == ("0.1", "")


def test_ratios_of_unequal_numbers() -> None:
    with pytest.raises(InputError, match="2 numerators and 1 denominators"):
        ratio_interval([1.0, 2.0], [1.0])


@pytest.mark.parametrize("interval", [mean_interval, median_interval, geometric_interval])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("x", "values 'x': must be a list of numbers"),
        (3.0, r"values of shape \[\]: must be a list"),
        ([[1.0, 2.0], [3.0, 4.0]], r"values of shape \[2, 2\]: must be a list"),
        ([1.0, "a"], "must be a list of numbers"),
        ([10**400], "must be a list of numbers"),
        ({"a": 1}, "must be a list of numbers"),
    ],
)
def test_values_that_are_no_list_of_numbers(interval: Any, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        interval(values)


def test_numbers_at_the_ends_of_the_format() -> None:
    plain = mean_interval([1.0, -1.0, 1.0])
    for scale in (2.0**1023, 2.0**-1000):
        found = mean_interval([scale, -scale, scale])
        assert found.estimate / scale == pytest.approx(plain.estimate)
        assert mean_interval([scale * 2.0**-4, -scale * 2.0**-4, scale * 2.0**-4]).high / scale == pytest.approx(
            plain.high / 16
        )
    assert geometric_interval([1e300, 1e-300]).high == math.inf  # no warning
