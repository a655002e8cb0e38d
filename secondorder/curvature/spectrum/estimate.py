"""A number with the error of its estimate."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.curvature.spectrum.products import norm

HALVES = 100


class Estimate(NamedTuple):
    """A value and its error: a standard error over random probes, a bound for eigenvalues, or their sum; 0 when exact.

    What Lanczos cannot see (`counting_bounds`) is part of the error of every number that depends on it. One probe tells nothing
    of its error, which is infinite then.
    """

    value: float
    error: float


def exact(value: float | Tensor) -> Estimate:
    """A number that is right up to rounding, as an estimate with the error 0."""
    return Estimate(float(value), 0.0)


def mean(samples: Tensor) -> Estimate:
    """The mean of independent samples `[K]` and its standard error."""
    value, error = mean_and_error(samples)
    return Estimate(float(value), float(error))


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error `[...]` over the first dimension of samples `[K, ...]`; the error is infinite for K = 1."""
    K = len(samples)
    unit = power_of_two(samples.abs().amax(0))
    x = samples / unit
    value = x.mean(0) * unit
    if K == 1:
        return value, torch.full_like(value, math.inf)
    return value, x.std(0) / math.sqrt(K) * unit


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two next above each number; 1 for zero and what is not finite.

    In such units no square is lost, and no digit changes.
    """
    exponent = torch.frexp(largest).exponent
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, torch.ldexp(torch.ones_like(largest), exponent.clamp(-1000, 1000)), 1)


def jackknife(statistic: Callable[[Tensor], float], probes: int) -> Estimate:
    """A function of K probes and its standard error from leaving one out:  error^2 = (K - 1) / K sum_i (f_-i - mean)^2.

    `statistic` gets the indices of the probes it may use. For smooth functions of means this is the delta method to
    first order, and for a mean the usual standard error.
    """
    every = torch.arange(probes)
    value = statistic(every)
    if probes == 1:
        return Estimate(value, math.inf)
    without = torch.tensor([statistic(every[every != i]) for i in range(probes)], dtype=torch.float64)
    return Estimate(value, math.sqrt((probes - 1) / probes) * float(norm(without - without.mean(), 0)))


def half_sampling(statistic: Callable[[Tensor], float], probes: int) -> Estimate:
    """A function of K probes and its standard error from leaving out half of them.

    For quantiles, which leaving out one probe may not move at all. `statistic` gets the indices of the probes it may use. The
    delete-d jackknife (J. Shao, C. Wu, Annals of Statistics 17, 1989), here over 100 random half-samples h: error^2 = (kept /
    left out) mean_h (f_h - f)^2.
    """
    every = torch.arange(probes)
    value = statistic(every)
    if probes == 1:
        return Estimate(value, math.inf)
    kept = (probes + 1) // 2
    source = torch.Generator().manual_seed(0)
    halves = [torch.randperm(probes, generator=source)[:kept] for _ in range(HALVES)]
    found = torch.tensor([statistic(half) for half in halves], dtype=torch.float64)
    return Estimate(value, math.sqrt(kept / (probes - kept) / HALVES) * float(norm(found - value, 0)))


def between(value: float, low: float, high: float, probes: int) -> Estimate:
    """A value whose truth lies between two bounds, which K probes gave: the error reaches to the farther one."""
    if math.isnan(value):
        return Estimate(value, value)
    return Estimate(value, math.inf if probes == 1 else max(value - low, high - value, 0.0))
