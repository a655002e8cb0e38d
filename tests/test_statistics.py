"""Intervals and verdicts."""

import math

import numpy as np
import pytest
from scipy import stats

from secondorder.errors import InputError
from studies.statistics import Comparison, Interval, mean_interval, ratio_interval, verdict, with_error


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
