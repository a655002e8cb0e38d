"""Confidence intervals over seeds and the verdicts drawn from them."""

from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from secondorder.errors import InputError, check_known

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided"


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided confidence interval from `n` independent values."""

    estimate: float
    low: float
    high: float
    n: int
    confidence: float = 0.95

    def __str__(self) -> str:
        if not np.isfinite([self.low, self.high]).all():
            return f"{self.estimate:.3g} (no interval, n = {self.n})"
        return f"{self.short} ({self.confidence:.0%} CI, n = {self.n})"

    @property
    def short(self) -> str:
        """``1.2 [1, 1.4]`` for tables, without ends that are not finite; empty when nothing was measured."""
        if self.n == 0:
            return ""
        if not np.isfinite([self.low, self.high]).all():
            return f"{self.estimate:.3g}"
        return f"{self.estimate:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Comparison:
    """The ratio of a pooling head to the reference head in one quantity, measured under one condition (line, layer, ...)."""

    pooling: str
    condition: str
    quantity: str
    interval: Interval
    left_out: int = 0
    """Measurements without a ratio because a value is zero."""

    @property
    def smaller(self) -> str:
        """The verdict on the claim that the ratio is below 1."""
        return verdict(self.interval, "below", 1.0)


def as_numbers(values: ArrayLike) -> NDArray[np.float64]:
    """The values as an array [n] of floats; InputError unless they are a list of numbers."""
    try:
        x = np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise InputError(f"values {values!r}: must be a list of numbers") from None
    if x.ndim != 1 or isinstance(values, str | bytes):
        raise InputError(f"values of shape {list(x.shape)}: must be a list of numbers [n]")
    return x


def check_confidence(confidence: float) -> None:
    """InputError unless the confidence is a number between 0 and 1."""
    if isinstance(confidence, bool) or not isinstance(confidence, Real) or not 0 < confidence < 1:
        raise InputError(f"confidence {confidence!r}: must be a number between 0 and 1")


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of independent values with Student's t interval, mean +- t_{n-1} s / sqrt(n).

    Infinite ends for a single value; nan throughout for none, or if one is not finite. InputError unless the values are a list
    of numbers, and the confidence is between 0 and 1.
    """
    x = as_numbers(values)
    check_confidence(confidence)
    if x.size == 0 or not np.isfinite(x).all():
        return Interval(float("nan"), float("nan"), float("nan"), x.size, confidence)
    if x.size == 1:
        return Interval(float(x[0]), -float("inf"), float("inf"), 1, confidence)
    size = float(np.abs(x).max()) or 1.0  # squares of huge or tiny values leave the range of numbers
    unit = x / size
    middle = float(unit.mean()) * size
    half = float(stats.t.ppf(0.5 + confidence / 2, x.size - 1) * unit.std(ddof=1) / np.sqrt(x.size)) * size
    return Interval(middle, middle - half, middle + half, x.size, confidence)


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike, confidence: float = 0.95) -> Interval:
    """Geometric mean of the paired ratios numerator_i / denominator_i, with the t interval of their logarithms.

    Entry i of both belongs to the same seed. Values must be positive, else nan throughout.
    """
    a, b = as_numbers(numerator), as_numbers(denominator)
    if a.shape != b.shape:
        raise InputError(f"{a.size} numerators and {b.size} denominators cannot be paired")
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = mean_interval(np.log(a) - np.log(b), confidence)
    return exponential(logs)


def geometric_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Geometric mean of independent positive values, with the t interval of their logarithms."""
    x = as_numbers(values)
    return ratio_interval(x, np.ones_like(x), confidence)


def exponential(logs: Interval) -> Interval:
    """The interval of exp(x), of the geometric mean where `logs` is that of a mean of logarithms."""
    with np.errstate(over="ignore", under="ignore"):  # beyond the largest number is infinite
        low, middle, high = (float(np.exp(v)) for v in (logs.low, logs.estimate, logs.high))
    return Interval(middle, low, high, logs.n, logs.confidence)


def median_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Median of independent values with its distribution-free interval between two of them (order statistics).

    The ends are infinite for fewer values than that takes, 6 for 95 %; nan throughout for none, or if one is not finite.
    """
    x = as_numbers(values)
    check_confidence(confidence)
    if x.size == 0 or not np.isfinite(x).all():
        return Interval(float("nan"), float("nan"), float("nan"), x.size, confidence)
    found = stats.quantile_test(x, p=0.5).confidence_interval(confidence)
    low, high = (end if np.isfinite(end) else sign * np.inf for end, sign in ((found.low, -1), (found.high, 1)))
    return Interval(float(np.median(x)), float(low), float(high), x.size, confidence)


def with_error(interval: Interval, error: float) -> Interval:
    """The interval of the same estimate with one more independent source of error, of standard error `error`.

    Each half width becomes the root of its square plus (z error)^2, z the normal quantile. InputError for a negative error.
    """
    if isinstance(error, bool) or not isinstance(error, Real) or error < 0:
        raise InputError(f"error {error!r}: a standard error is a number of at least 0")
    z = float(stats.norm.ppf(0.5 + interval.confidence / 2))
    down, up = (
        np.hypot(interval.estimate - interval.low, z * error),
        np.hypot(interval.high - interval.estimate, z * error),
    )
    return replace(interval, low=interval.estimate - float(down), high=interval.estimate + float(up))


def verdict(interval: Interval, claimed: str, reference: float) -> str:
    """What `interval` says of the claim that the value is ``below`` or ``above`` `reference`.

    ``supported`` if the whole interval lies on the claimed side, ``not supported`` if it lies on the other, else
    (it holds the reference, is infinite or nan) ``undecided``. InputError for another claim, or a reference that is no number.
    """
    if isinstance(reference, bool) or not isinstance(reference, Real):
        raise InputError(f"reference {reference!r}: must be a number")
    sides = {"below": (interval.high < reference, interval.low > reference)}
    sides["above"] = sides["below"][::-1]
    check_known("claim", claimed, sides)
    agrees, contradicts = sides[claimed]
    return SUPPORTED if agrees else NOT_SUPPORTED if contradicts else UNDECIDED
