"""Spectra of symmetric operators: extreme eigenvalues, densities, traces, summaries, differences.

Every estimate comes with its error. Vectors and sums are float64 on the operator's device, results float64 on the CPU,
random probes from a seeded generator of their own.
"""

from secondorder.curvature.spectrum.density import SpectralDensity, exact_density, spectral_density
from secondorder.curvature.spectrum.density_curve import DensityCurve
from secondorder.curvature.spectrum.difference import relative_difference
from secondorder.curvature.spectrum.estimate import Estimate
from secondorder.curvature.spectrum.lanczos import TopEigenvalues, top_eigenvalues
from secondorder.curvature.spectrum.summary import SpectralSummary, spectral_summary, summary_table
from secondorder.curvature.spectrum.trace_estimates import (
    DiagonalEstimate,
    diagonal_estimate,
    frobenius_norm_estimate,
    trace_estimate,
)

__all__ = [
    "DensityCurve",
    "DiagonalEstimate",
    "Estimate",
    "SpectralDensity",
    "SpectralSummary",
    "TopEigenvalues",
    "diagonal_estimate",
    "exact_density",
    "frobenius_norm_estimate",
    "relative_difference",
    "spectral_density",
    "spectral_summary",
    "summary_table",
    "top_eigenvalues",
    "trace_estimate",
]
