"""Inner products of two operators: <A, A>, <A, B>, <B, B> and |scale A - B|^2 in the Frobenius norm.

    dense         both matrices, when they have at most 2048 rows, or so few that probes would cost as much; no
                  cancellation in A - B
    structured    from factors, rows and bases of stored operators without a dense matrix (`exact.inner_product`);
                  |A - B|^2 = <A, A> - 2 <A, B> + <B, B>, so that a relative error below 1e-8 is lost in rounding
    stochastic    probes shared by both operators and a sketch of both (`sketch`), 4 products a probe and operator

Index letters: P rows, K probes (1 when exact).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.operators.difference import check_same_space
from secondorder.curvature.spectrum.estimate import Estimate, exact, jackknife
from secondorder.curvature.spectrum.exact import EXACT_SIZE, in_memory, inner_product
from secondorder.curvature.spectrum.products import (
    check_count,
    check_name,
    check_operator,
    finite,
    generator,
)
from secondorder.curvature.spectrum.sketch import Sketch
from secondorder.curvature.spectrum.units import scaled, squares_are_lost, unit_of
from secondorder.errors import InputError

METHODS = ("auto", "exact", "stochastic")


@dataclass(frozen=True)
class FrobeniusProducts:
    """<A, A>, <A, B>, <B, B> and |scale A - B|^2, one value for each probe, `[K]` on the CPU.

    A and B are in units a and b, `ratio` = a / b, where their squares would leave the range of numbers: <A, A> in a^2, <A, B> in
    a b, <B, B> and the difference in b^2.
    """

    first: Tensor
    mixed: Tensor
    second: Tensor
    difference_in_units: Callable[[float], Tensor]
    method: str
    ratio: float = 1.0

    def difference(self, scale: float) -> Tensor:
        """|scale A - B|_F^2 by each probe, float64 `[K]` on the CPU; in units of b^2 where A and B are in units."""
        scale = scale * self.ratio
        return self.difference_in_units(scale) if math.isfinite(scale) else torch.full_like(self.first, math.inf)

    @property
    def best_scale(self) -> Estimate:
        """<A, B> / <A, A>, which brings A nearest to B."""
        value, error = self.statistic(lambda aa, ab: ab / aa if aa > 0 else 0.0, self.first, self.mixed)
        return Estimate(value / self.ratio, error / self.ratio)

    def statistic(self, function: Callable[..., float], *samples: Tensor) -> Estimate:
        """A function of the means of samples `[K]`, and its standard error over the probes."""
        if self.method == "stochastic":
            return jackknife(lambda index: function(*[float(x[index].mean()) for x in samples]), len(self.first))
        return exact(function(*[float(x) for x in samples]))


def frobenius_products(
    A: SymmetricOperator, B: SymmetricOperator, method: str, probes: int, seed: int, memory: int | None
) -> FrobeniusProducts:
    """The inner products by the cheapest exact way, or, with "auto", by probes when there is none.

    Args:
        A, B: operators of one size, number format and device.
        method: "auto", "exact" or "stochastic".
        probes, seed: random vectors of "stochastic" and their random numbers.
        memory: bytes of their vectors; None: what is available, and 2 GiB at least.

    Raises:
        InputError: for operators that do not fit, bad arguments, and "exact" where neither way is open.
        NonFiniteError: for a matrix or product that is not finite.
    """
    if isinstance(A, SymmetricOperator) and isinstance(B, SymmetricOperator):
        check_same_space(A, B)
    check_operator(A)
    check_operator(B)
    check_name("method", method, METHODS)
    check_count("probes", probes)
    found = _products(A, B, method, probes, seed, memory)
    if not squares_are_lost(float(found.first.mean()), float(found.second.mean())):
        return found
    a, b = unit_of(A), unit_of(B)
    in_units = _products(scaled(A, 1 / a), scaled(B, 1 / b), method, probes, seed, memory)
    for operator, squared in ((A, in_units.first), (B, in_units.second)):
        finite("norm", operator, squared)
    return replace(in_units, ratio=a / b)


def _products(
    A: SymmetricOperator, B: SymmetricOperator, method: str, probes: int, seed: int, memory: int | None
) -> FrobeniusProducts:
    if method != "stochastic" or A.size <= 4 * probes:
        found = _exact(A, B, max(EXACT_SIZE, 4 * probes))
        if found is not None:
            return found
        if method == "exact":
            raise InputError(
                f"no exact inner product of {type(A).__name__} and {type(B).__name__} with {A.size} rows (dense up to "
                f"{EXACT_SIZE}); use method='stochastic', or a FactoredOperator of rows that fit in memory"
            )
    return _stochastic(A, B, probes, seed, memory)


def _exact(A: SymmetricOperator, B: SymmetricOperator, dense_size: int) -> FrobeniusProducts | None:
    if A.size <= dense_size:
        a, b = (finite("matrix", operator, operator.dense()) for operator in (A, B))
        inner = lambda x, y: (x * y).sum().cpu()[None]  # noqa: E731
        return FrobeniusProducts(
            inner(a, a), inner(a, b), inner(b, b), lambda scale: inner(scale * a - b, scale * a - b), "dense"
        )
    A, B = in_memory(A), in_memory(B)
    aa, ab, bb = (inner_product(x, y) for x, y in ((A, A), (A, B), (B, B)))
    if aa is None or ab is None or bb is None:
        return None
    known = torch.tensor([[aa], [ab], [bb]], dtype=torch.float64)
    weights = lambda scale: torch.tensor([scale**2, -2 * scale, 1.0], dtype=torch.float64)  # noqa: E731
    first, mixed, second = known
    return FrobeniusProducts(first, mixed, second, lambda scale: (weights(scale) @ known).clamp_min(0), "structured")


def _stochastic(
    A: SymmetricOperator, B: SymmetricOperator, probes: int, seed: int, memory: int | None
) -> FrobeniusProducts:
    sketch = Sketch([A, B], probes, generator(seed), memory)
    a, b = sketch.images

    def difference(scale: float) -> Tensor:
        d = a.minus(b, scale)
        return sketch.inner(d, d)

    return FrobeniusProducts(sketch.inner(a, a), sketch.inner(a, b), sketch.inner(b, b), difference, "stochastic")
