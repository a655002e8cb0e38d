"""A spectrum as a curve: Gaussian-broadened density and cumulative distribution on a linear or symmetric-log axis.

Index letters: K probes, M nodes, X points of the axis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.curvature.spectrum.estimate import mean_and_error

SCALES = ("linear", "symlog")


@dataclass(frozen=True)
class DensityCurve:
    """A spectrum at X points, all tensors float64 `[X]` on the CPU.

    Args:
        eigenvalue: the points.
        position: their place s on the axis, the eigenvalue itself or asinh(eigenvalue / (2 linear)) / log(10), which is
            +-log10(|eigenvalue| / linear) away from zero.
        density: share of the spectrum per unit of s, without the part at zero, each node broadened to a Gaussian of standard
            deviation `width` in s; it integrates to 1 minus the share at zero.
        cumulative: share of eigenvalues up to the point, with the part at zero as a step and without broadening.
        density_error, cumulative_error: standard errors over probes.
        scale: of the axis, "linear" or "symlog".
        linear: the eigenvalue below which a symlog axis is about linear.
        width: standard deviation of the broadening, in units of s.
    """

    eigenvalue: Tensor
    position: Tensor
    density: Tensor
    density_error: Tensor
    cumulative: Tensor
    cumulative_error: Tensor
    scale: str
    linear: float
    width: float


def density_curve(
    nodes: Tensor, shares: Tensor, zero: float, scale: str, points: int, width: float | None, linear: float
) -> DensityCurve:
    """The curve of nodes `[K, M]` with shares `[K, M]` that sum to 1 for each probe; |node| <= zero counts as zero.

    Args:
        scale, points: of the axis, as of `SpectralDensity.curve`.
        width: standard deviation of the Gaussians in units of the axis; None: a hundredth of its range.
        linear: eigenvalue up to which a symlog axis is about linear.
    """
    position, eigenvalue = axis(scale, linear)
    places = position(nodes)
    beside = torch.where(nodes.abs() > zero, shares, 0)
    seen = places[shares > 1e-14]  # not the empty nodes of an exhausted probe
    low, high = float(seen.min()), float(seen.max())
    width = (max((high - low) / 100, 1e-3 * max(abs(low), abs(high))) or 1.0) if width is None else width
    s = torch.linspace(low - 4 * width, high + 4 * width, points, dtype=torch.float64)
    # one point at a time: [K, M] numbers instead of [K, M, X]
    density = torch.stack([(_bell((x - places) / width) * beside).sum(1) / width for x in s], 1)
    x = eigenvalue(s)
    value, error = mean_and_error(density)
    share, share_error = mean_and_error(cumulative(nodes, shares, zero, x))
    return DensityCurve(x, s, value, error, share, share_error, scale, linear, width)


def cumulative(nodes: Tensor, shares: Tensor, zero: float, points: Tensor) -> Tensor:
    """The share of each probe `[K, X]` in eigenvalues up to each of the points `[X]`, for nodes and shares `[K, M]`."""
    nodes = torch.where(nodes.abs() > zero, nodes, 0)
    return torch.stack([torch.where(nodes <= x, shares, 0).sum(1) for x in points], 1)


def axis(scale: str, linear: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The maps from eigenvalues to places on a "linear" or "symlog" axis, and back, both elementwise."""
    if scale == "linear":
        return (lambda x: x), (lambda s: s)
    return (lambda x: (x / (2 * linear)).asinh() / math.log(10)), (lambda s: 2 * linear * (s * math.log(10)).sinh())


def _bell(z: Tensor) -> Tensor:
    return (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
