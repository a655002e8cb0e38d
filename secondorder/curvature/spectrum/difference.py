"""How far one operator is from another, relative to the other's size."""

import math

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.estimate import Estimate
from secondorder.curvature.spectrum.frobenius_products import frobenius_products


def relative_difference(
    A: SymmetricOperator,
    B: SymmetricOperator,
    method: str = "auto",
    *,
    probes: int = 20,
    seed: int = 0,
    memory: int | None = None,
) -> Estimate:
    """|A - B|_F / |B|_F with its standard error; B is the reference, e.g. the Hessian, A its Gauss-Newton matrix.

    For a zero B the ratio is infinite, or 0 if A is zero too.

    Args:
        A, B: operators of one size, number format and device.
        method: "auto" is exact for stored operators and up to 2048 rows, else "stochastic": numerator and denominator from the
            same probes, so that their errors cancel in part; "exact" raises InputError rather than use probes.
        probes: random vectors of "stochastic".
        seed: of the probes.
        memory: bytes of their vectors; None: what is available, and 2 GiB at least.

    Raises:
        InputError: for operators of different size, number format or device, bad arguments, and too little memory.
        NonFiniteError: for a matrix or product that is not finite.
    """
    found = frobenius_products(A, B, method, probes, seed, memory)
    return found.statistic(root_ratio, found.difference(1.0), found.second)


def root_ratio(part: float, whole: float) -> float:
    """sqrt(part / whole); 0 / 0 is 0, and part / 0 is infinite."""
    if whole <= 0:
        return math.inf if part > 0 else 0.0
    return math.sqrt(max(part, 0.0) / whole)
