"""Single numbers of a spectrum, as functions of eigenvalues `[M]` and how many eigenvalues each stands for `[M]`.

All but the trace-like sums are scale-free, and all are 0 for the zero matrix. "Magnitude" is |lambda|.
"""

import math

import torch
from torch import Tensor


def effective_rank(values: Tensor, numbers: Tensor) -> float:
    """exp of the entropy of |lambda| / sum |lambda| (O. Roy, M. Vetterli, EUSIPCO 2007): P for equal magnitudes, 0 for none.

    Args:
        values, numbers: eigenvalues `[M]` and how many each stands for `[M]`.
    """
    magnitudes = values.abs()
    total = (numbers * magnitudes).sum()
    if total == 0:
        return 0.0
    p = magnitudes / total
    return float((-numbers * torch.special.xlogy(p, p)).sum().exp())


def participation(values: Tensor, numbers: Tensor) -> float:
    """(tr A)^2 / |A|_F^2 of eigenvalues `[M]` and their numbers `[M]`: at most the rank of A, 0 for the zero matrix."""
    scale = values.abs().max()
    if scale == 0:
        return 0.0
    x = values / scale  # squares of tiny eigenvalues would vanish
    return float((numbers * x).sum().square() / (numbers * x.square()).sum())


def stable_rank(values: Tensor, numbers: Tensor, largest: float) -> float:
    """|A|_F^2 / |A|_2^2 of eigenvalues `[M]` and their numbers `[M]`, for a known |A|_2 = `largest`; 0 for the zero matrix."""
    return float((numbers * (values / largest).square()).sum()) if largest > 0 else 0.0


def negative_share(values: Tensor, numbers: Tensor) -> float:
    """sum of |lambda| over negative eigenvalues / sum over all, on [0, 1], of eigenvalues `[M]` and their numbers `[M]`."""
    total = float((numbers * values.abs()).sum())
    return float((numbers * values.clamp_max(0).abs()).sum()) / total if total > 0 else 0.0


def number_above(values: Tensor, numbers: Tensor, threshold: float) -> float:
    """How many eigenvalues have a magnitude above the threshold (absolute): the numerical rank, from values and numbers `[M]`."""
    return float(numbers[values.abs() > threshold].sum())


def smallest_above(values: Tensor, numbers: Tensor, threshold: float) -> float:
    """The smallest magnitude above the threshold (absolute): where the numbers, summed from below, reach half an eigenvalue.

    Lanczos nodes between two eigenvalues stand for much less than one and are passed over. NaN for an empty range.
    """
    return _where_sum_reaches(*_range(values, numbers, threshold), 0.5)


def median_above(values: Tensor, numbers: Tensor, threshold: float) -> float:
    """The median of the magnitudes above the threshold (absolute), of eigenvalues and numbers `[M]`. NaN for an empty range."""
    magnitudes, numbers = _range(values, numbers, threshold)
    return _where_sum_reaches(magnitudes, numbers, float(numbers.sum()) / 2)


def trace_quantile_condition(values: Tensor, numbers: Tensor) -> float:
    """The magnitudes at which their sum, from the largest down, reaches 10 % and 90 %, as a ratio; NaN for the zero matrix."""
    magnitudes, index = values.abs().sort(descending=True)
    parts = magnitudes * numbers[index]
    total = float(parts.sum())
    return _where_sum_reaches(magnitudes, parts, 0.1 * total) / _where_sum_reaches(magnitudes, parts, 0.9 * total)


def _range(values: Tensor, numbers: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Magnitudes above the threshold, ascending, with their numbers."""
    magnitudes, index = values.abs().sort()
    above = magnitudes > threshold
    return magnitudes[above], numbers[index][above]


def _where_sum_reaches(sorted_values: Tensor, parts: Tensor, goal: float) -> float:
    if parts.sum() <= 0:
        return math.nan
    sums = parts.cumsum(0)
    place = torch.searchsorted(sums, torch.tensor(goal * (1 - 1e-12), dtype=sums.dtype))
    return float(sorted_values[place.clamp_max(len(sums) - 1)])
