"""Functions of symmetric positive semi-definite matrices, right to second order.

From the outside in: `functions` (what users call), `checks`, `crossover` (which way is faster), `strategies` and `kernels`
(the fast ways), `two_level` (fast first derivatives with exact higher ones), `spectral` and `newton_schulz` (the
definitions), `scalar_functions` and `spectrum` (functions of eigenvalues and their divided differences), `units` and
`precision` (any scale, full precision).
"""

from secondorder.matrix_power.functions import (
    covariance,
    covariance_log,
    covariance_power,
    covariance_sqrt,
    matrix_log,
    matrix_power,
    matrix_sqrt,
)
from secondorder.matrix_power.newton_schulz import newton_schulz_sqrt
from secondorder.matrix_power.upper_triangle import upper_triangle

__all__ = [
    "covariance",
    "covariance_log",
    "covariance_power",
    "covariance_sqrt",
    "matrix_log",
    "matrix_power",
    "matrix_sqrt",
    "newton_schulz_sqrt",
    "upper_triangle",
]
