"""95 % confidence intervals of independent values: seeds, or repeats of a timing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from secondorder.errors import InputError


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided 95 % confidence interval from `n` independent values."""

    estimate: float
    low: float
    high: float
    n: int

    @property
    def short(self) -> str:
        """``1.2 [1, 1.4]`` for tables, without ends that are not finite; empty when nothing was measured."""
        if self.n == 0:
            return ""
        if not np.isfinite([self.low, self.high]).all():
            return f"{self.estimate:.3g}"
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"


def mean_interval(values: ArrayLike, within: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
    """Mean of independent values with Student's t interval, mean +- t_{n-1} s / sqrt(n), as far as it lies `within` a range.

    within: ends between which the mean must lie, (0, 1) for shares: what is beyond them leaves the interval, which covers the
    mean as often without it. Infinite ends for a single value; nan throughout for none, or if one is not finite. InputError
    unless the values are a list of numbers; so too below.
    """
    x = _numbers(values)
    if x.size == 0 or not np.isfinite(x).all():
        return Interval(np.nan, np.nan, np.nan, x.size)
    if x.size == 1:
        return Interval(float(x[0]), -np.inf, np.inf, 1)
    size = float(np.abs(x).max()) or 1.0  # squares of huge or tiny values leave the range of numbers
    unit = x / size
    middle = float(unit.mean()) * size
    half = float(stats.t.ppf(0.975, x.size - 1) * unit.std(ddof=1) / np.sqrt(x.size)) * size
    low, high = np.clip([middle - half, middle + half], *within).tolist()
    return Interval(middle, low, high, x.size)


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike) -> Interval:
    """Geometric mean of the paired ratios numerator_i / denominator_i, with the t interval of their logarithms.

    Entry i of both belongs to the same seed. Values must be positive, else nan throughout.
    """
    a, b = _numbers(numerator), _numbers(denominator)
    if a.shape != b.shape:
        raise InputError(f"{a.size} numerators and {b.size} denominators cannot be paired")
    with np.errstate(all="ignore"):  # of values without a logarithm; beyond the largest number is infinite
        logs = mean_interval(np.log(a) - np.log(b))
        middle, low, high = np.exp([logs.estimate, logs.low, logs.high]).tolist()
    return Interval(middle, low, high, logs.n)


def geometric_interval(values: ArrayLike) -> Interval:
    """Geometric mean of independent positive values, with the t interval of their logarithms."""
    x = _numbers(values)
    return ratio_interval(x, np.ones_like(x))


def median_interval(values: ArrayLike) -> Interval:
    """Median of independent values with its distribution-free interval between two of them (order statistics).

    The ends are infinite for fewer values than that takes, 6; nan throughout for none, or if one is not finite.
    """
    x = _numbers(values)
    if x.size == 0 or not np.isfinite(x).all():
        return Interval(np.nan, np.nan, np.nan, x.size)
    found = stats.quantile_test(x, p=0.5).confidence_interval(0.95)  # nan for an end that it cannot have
    low, high = np.nan_to_num(found.low, nan=-np.inf), np.nan_to_num(found.high, nan=np.inf)
    return Interval(float(np.median(x)), float(low), float(high), x.size)


def _numbers(values: ArrayLike) -> NDArray[np.float64]:
    try:
        x = np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"values {values!r}: must be a list of numbers") from None
    if x.ndim != 1 or isinstance(values, str | bytes):
        raise InputError(f"values of shape {list(x.shape)}: must be a list of numbers [n]")
    return x
