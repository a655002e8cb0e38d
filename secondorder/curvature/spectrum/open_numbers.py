"""The numbers of a summary that single eigenvalues decide, of which Lanczos sees some: ranks, condition numbers, shares.

Each is a statistic of the eigenvalues, or of the quadrature with an error that reaches as far as the truth is open.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secondorder.curvature.spectrum import spectral_statistics as statistics
from secondorder.curvature.spectrum.counting_bounds import CountingBounds
from secondorder.curvature.spectrum.density import SpectralDensity
from secondorder.curvature.spectrum.estimate import Estimate, between, exact

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
    top, probes = largest_magnitude(largest, smallest), len(density.nodes)
    nodes, numbers = density.nodes.flatten(), density.weights.flatten() / probes
    found = {name: function(nodes, numbers, top.value, density.zero) for name, function in AT_THRESHOLD.items()}
    bounds = density.bounds
    if bounds is None or top.value == 0:
        return {name: exact(value) for name, value in found.items()}
    low, high = bounds.beyond(torch.tensor([density.zero], dtype=torch.float64))
    rank = float(low), float(high)
    ranges = {
        "rank": rank,
        "condition": _condition(density, bounds, top),
        "median_condition": _median(density, bounds, top, rank),
    }
    return {name: between(found[name], *ends, probes) for name, ends in ranges.items()}


def _median(
    density: SpectralDensity, bounds: CountingBounds, top: Estimate, rank: tuple[float, float]
) -> tuple[float, float]:
    """|A|_2 over the least magnitude that less than half of the range can lie beyond, and over the largest that half lies beyond.

    Looked for at the nodes, a little above and below them, and between.
    """
    magnitudes = density.nodes.abs().unique()
    magnitudes = magnitudes[magnitudes > density.zero]
    beside = 2 * bounds.slack
    places = torch.cat([magnitudes - beside, magnitudes + beside, (magnitudes[1:] * magnitudes[:-1]).sqrt()])
    places = places[places > density.zero]
    low, high = bounds.beyond(places)
    least = max([density.zero, *places[low > rank[1] / 2].tolist()])
    largest = min([top.value, *places[high < rank[0] / 2].tolist()])
    return (top.value - top.error) / largest, (top.value + top.error) / least if least > 0 else math.inf


def _condition(density: SpectralDensity, bounds: CountingBounds, top: Estimate) -> tuple[float, float]:
    """|A|_2 over the smallest magnitude above the threshold that was certainly seen, and over the smallest that may exist."""
    nodes, off = bounds.quadrature.nodes.abs(), bounds.quadrature.residuals + bounds.slack
    apart = bounds.apart.abs()
    ends = torch.cat(
        [(nodes + off)[nodes - off > density.zero], (apart + bounds.slack)[apart - bounds.slack > density.zero]]
    )
    smallest = min([top.value, *ends.tolist()])
    least = max(bounds.end_of_empty(density.zero, smallest), density.zero)
    return (top.value - top.error) / smallest, (top.value + top.error) / least if least > 0 else math.inf
