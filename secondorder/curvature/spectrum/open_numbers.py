"""The numbers of a summary that single eigenvalues decide, of which Lanczos sees some: ranks, condition numbers, shares.

Each is a statistic of the eigenvalues, or of the quadrature with an error that reaches as far as the truth is open.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secondorder.curvature.spectrum import spectral_statistics as statistics
from secondorder.curvature.spectrum.density import SpectralDensity
from secondorder.curvature.spectrum.estimate import Estimate, between

AT_THRESHOLD: dict[str, Callable[[Tensor, Tensor, float, float], float]] = {
    "rank": lambda values, numbers, top, bound: statistics.number_above(values, numbers, bound),
    "condition": lambda values, numbers, top, bound: top / statistics.smallest_above(values, numbers, bound),
    "median_condition": lambda values, numbers, top, bound: top / statistics.median_above(values, numbers, bound),
}
"""Name -> statistic of eigenvalues, how many each stands for, the largest magnitude, and the threshold as a magnitude."""


def largest_magnitude(largest: Estimate, smallest: Estimate) -> Estimate:
    """|A|_2 from the largest and the smallest eigenvalue: the one of larger magnitude, with its error."""
    return max(Estimate(abs(value), error) for value, error in (largest, smallest))


def exact_numbers(density: SpectralDensity, doubt: float) -> dict[str, Estimate]:
    """Rank and condition numbers, by name, of known eigenvalues: rounding may have moved them by `doubt` across the threshold."""
    values, numbers = density.nodes[0], density.weights[0]
    top = float(values.abs().max())
    found = {}
    for name, function in AT_THRESHOLD.items():
        shifts = (0.0, -doubt, doubt)
        value, *others = (function(values, numbers, top, max(density.zero + shift, 0.0)) for shift in shifts)
        found[name] = between(value, min(others), max(others), probes=2)
    return found


def quadrature_numbers(density: SpectralDensity, largest: Estimate, smallest: Estimate) -> dict[str, Estimate]:
    """Rank and condition numbers, by name, of a quadrature and both ends of the spectrum; errors cover what is left open."""
    top = largest_magnitude(largest, smallest)

    found = {
        name: density.statistic_of_range(lambda x, n, f=function: f(x, n, top.value, density.zero))  # type: ignore[misc]
        for name, function in AT_THRESHOLD.items()
    }
    if density.bounds is None or top.value == 0:
        return found
    low, high = density.bounds.beyond(torch.tensor([density.zero], dtype=torch.float64))
    ranges = {"rank": (float(low), float(high)), "condition": _condition(density, top)}
    return found | {name: between(found[name].value, *ends, probes=len(density.nodes)) for name, ends in ranges.items()}


def _condition(density: SpectralDensity, top: Estimate) -> tuple[float, float]:
    """|A|_2 over the smallest magnitude above the threshold that was certainly seen, and over the smallest that may exist."""
    bounds = density.bounds
    assert bounds is not None
    nodes, off = bounds.quadrature.nodes.abs(), bounds.quadrature.residuals + bounds.slack
    apart = bounds.apart.abs()
    ends = torch.cat(
        [(nodes + off)[nodes - off > density.zero], (apart + bounds.slack)[apart - bounds.slack > density.zero]]
    )
    smallest = min([top.value, *ends.tolist()])
    least = max(bounds.end_of_empty(density.zero, smallest), density.zero)
    return (top.value - top.error) / smallest, (top.value + top.error) / least if least > 0 else math.inf
