"""The Gauss-Newton optimiser: exact products, conjugate gradients; what K-FAC approximates, for small networks."""

from secondorder.gauss_newton.optimizer import GaussNewton, Report

__all__ = ["GaussNewton", "Report"]
