"""Intervals and verdicts."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from secondorder.errors import InputError
from studies.statistics import (
    UNDECIDED,
    Comparison,
    Interval,
    exponential,
    geometric_interval,
    mean_interval,
    median_interval,
    ratio_interval,
    verdict,
    with_error,
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


@pytest.mark.parametrize(
    ("low", "high", "below", "above"),
    [
        (0.2, 0.9, "supported", "not supported"),
        (1.1, 2.0, "not supported", "supported"),
        (0.5, 1.5, "undecided", "undecided"),
        (0.5, 1.0, "undecided", "undecided"),
        (-np.inf, np.inf, "undecided", "undecided"),
        (np.nan, np.nan, "undecided", "undecided"),
    ],
)
def test_verdict(low: float, high: float, below: str, above: str) -> None:
    interval = Interval(0.5 * (low + high), low, high, 3)
    assert verdict(interval, "below", 1.0) == below
    assert verdict(interval, "above", 1.0) == above
    assert Comparison("gcp", "line", "loss", interval).smaller == below


def test_one_seed_and_bad_values_stay_undecided() -> None:
    assert verdict(mean_interval([0.1]), "below", 1.0) == "undecided"
    assert verdict(ratio_interval([0.1, 0.0], [1.0, 1.0]), "below", 1.0) == "undecided"
    assert verdict(ratio_interval([0.1, np.nan], [1.0, 1.0]), "below", 1.0) == "undecided"
    assert verdict(mean_interval([]), "below", 1.0) == "undecided"
    assert "no interval" in str(mean_interval([0.1]))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="2 numerators and 1 denominators"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(InputError, match="'beside'"):
        verdict(mean_interval([1.0, 2.0]), "beside", 1.0)


def test_independent_errors_add_in_quadrature() -> None:
    found = with_error(Interval(1.0, 0.7, 1.3, 5), 0.4 / 1.959963984540054)
    assert (found.low, found.high) == pytest.approx((0.5, 1.5))
    assert (found.estimate, found.n) == (1.0, 5)
    unknown = with_error(Interval(1.0, 0.7, math.inf, 5), math.inf)
    assert (unknown.low, unknown.high) == (-math.inf, math.inf)


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


@pytest.mark.parametrize("interval", [mean_interval, median_interval, geometric_interval])
@pytest.mark.parametrize("confidence", [0, 1, -1, 2, math.nan, "0.95", None, True, [0.9]])
def test_confidences_that_are_none(interval: Any, confidence: Any) -> None:
    with pytest.raises(InputError, match="must be a number between 0 and 1"):
        interval([1.0, 2.0, 3.0], confidence)


def test_other_bad_numbers() -> None:
    one = Interval(1.0, 0.5, 1.5, 3)
    for error in ("x", -1.0, None, True):
        with pytest.raises(InputError, match="a standard error is a number of at least 0"):
            with_error(one, error)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="reference 'x': must be a number"):
        verdict(one, "below", "x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"unknown claim \[\]; choose one of: below, above"):
        verdict(one, [], 1.0)  # type: ignore[arg-type]
    assert verdict(one, "below", np.float32(0.25)) == verdict(one, "below", 0.25)  # type: ignore[arg-type]


def test_numbers_at_the_ends_of_the_format() -> None:
    plain = mean_interval([1.0, -1.0, 1.0])
    for scale in (2.0**1023, 2.0**-1000):
        found = mean_interval([scale, -scale, scale])
        assert found.estimate / scale == pytest.approx(plain.estimate)
        assert mean_interval([scale * 2.0**-4, -scale * 2.0**-4, scale * 2.0**-4]).high / scale == pytest.approx(
            plain.high / 16
        )
    over = exponential(Interval(800.0, 799.0, 801.0, 3))  # no warning
    assert (over.low, over.high) == (math.inf, math.inf)
    assert verdict(with_error(Interval(1.0, 0.5, 1.5, 3), math.inf), "below", 3.0) == UNDECIDED
