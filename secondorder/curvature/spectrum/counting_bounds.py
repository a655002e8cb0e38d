"""How many eigenvalues lie beyond a point, between bounds: what Lanczos has seen, what it cannot see, and chance.

After M steps from a unit vector v with the spectral measure mu (mass <v, u_i>^2 at lambda_i), Jacobi matrix diagonal alpha_m, off
diagonal beta_m and orthonormal polynomials  beta_m p_m = (x - alpha_m) p_(m-1) - beta_(m-1) p_(m-2),  p_0 = 1, the quadrature's
W(x) = sum of weights of nodes <= x is right up to the Christoffel function (Chebyshev, Markov, Stieltjes):

    |mu(-inf, x] - W(x)| <= 1 / sum_(m = 0..M) p_m(x)^2.

It is as large as a node's weight where Lanczos sees a continuum, be it a cluster or a decay in truth, and vanishes in gaps beside
converged eigenvalues. Over random v in R dimensions n eigenvalues have the mass n / R in the mean, with the variance
2 n (R - n) / (R^2 (R + 2)).

N. Akhiezer, "The Classical Moment Problem", 1965; G. Golub, G. Meurant, "Matrices, Moments and Quadrature", 2010.

Index letters: K probes, M steps, L eigenvalues that are known apart, X points.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.special import gammaincinv
from torch import Tensor

from secondorder.curvature.spectrum.quadrature import Quadrature

UNLIKELY = 1e-6
"""The probability that an interval which is said to be empty is not."""
TRIED, REFINED = 64, 4
"""Points that are tried at a time when the end of an empty interval is looked for, and how often."""


class Interval(NamedTuple):
    """Lower and upper bounds of shares or numbers of eigenvalues, two float64 tensors of one shape."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class CountingBounds:
    """Bounds of numbers of eigenvalues: of R = `rest` from a quadrature, and of L known ones `apart` `[L]`.

    Args:
        slack: how far a point is known (rounding of products, residuals of the known eigenvalues).
    """

    quadrature: Quadrature
    apart: Tensor
    rest: int
    slack: float

    def shares(self, x: Tensor) -> Interval:
        """Bounds `[K, X]`, from 0 to 1, of the mass of each probe in eigenvalues up to each point x `[X]`."""
        ends = torch.cat([x - self.slack, x + self.slack])
        (low, high), (below, above) = (f(ends).chunk(2, 1) for f in (self.quadrature.up_to, self.quadrature.unseen))
        return Interval((low - below).clamp_min(0), (high + above).clamp_max(1))

    def up_to(self, x: Tensor) -> Interval:
        """Bounds `[X]` of the number of eigenvalues <= x at each point of x `[X]`, wider by a standard error of the probes."""
        return self._numbers(self.shares(x), x[:, None] - self.apart)

    def beyond(self, x: Tensor) -> Interval:
        """Bounds `[X]` of the number of magnitudes > x >= 0 at each point of x `[X]`, wider by a standard error of the probes."""
        above, below = self._both_sides(x)
        shares = Interval((1 - above.high + below.low).clamp_min(0), (1 - above.low + below.high).clamp_max(1))
        return self._numbers(shares, self.apart.abs() - x[:, None], True)

    def end_of_empty(self, start: float, stop: float) -> float:
        """An x in [start, stop] with no magnitude in (start, x), the largest that is known to have none.

        A single eigenvalue in an interval has a mean mass of chi^2 / (K R) there, chi^2 with K degrees of freedom: less mass than
        that has the probability UNLIKELY.
        """
        low, high = start, stop
        for _ in range(REFINED):
            ends = _between(low, high)
            empty = self._is_empty(start, ends)
            if not bool(empty.any()):
                return low
            last = int(empty.nonzero().max())
            low, high = float(ends[last]), float(ends[min(last + 1, len(ends) - 1)])
        return low

    def reach(self, extreme: float, upwards: bool) -> float:
        """How far above (`upwards`) or below an extreme Ritz value another eigenvalue may be.

        Infinite where nothing rules it out.
        """
        distances = float(self.quadrature.nodes.abs().max()) * torch.logspace(-16, 1, TRIED, dtype=torch.float64)
        shares = self.shares(extreme + distances if upwards else extreme - distances)
        empty = (1 - shares.low if upwards else shares.high).mean(0) < self._least_mass
        return float(distances[empty.nonzero().min()]) if bool(empty.any()) else math.inf

    def _is_empty(self, start: float, ends: Tensor) -> Tensor:
        above, below = self._both_sides(torch.cat([ends.new_tensor([start]), ends]))
        mass = (above.high[:, 1:] - above.low[:, :1] + below.high[:, :1] - below.low[:, 1:]).clamp_min(0).mean(0)
        magnitudes = self.apart.abs()
        known = (magnitudes > start + self.slack) & (magnitudes < ends[:, None] + self.slack)
        return (mass < self._least_mass) & ~known.any(1)

    @property
    def _least_mass(self) -> float:
        """The mean mass that an eigenvalue has unless something UNLIKELY happens."""
        K = len(self.quadrature.nodes)
        return 2 * float(gammaincinv(K / 2, UNLIKELY)) / K / max(self.rest, 1)

    def _both_sides(self, x: Tensor) -> tuple[Interval, Interval]:
        """The shares up to x, and those below -x, strictly: up to the next number."""
        shares = self.shares(torch.cat([x, torch.nextafter(-x, torch.full_like(x, -math.inf))]))
        above, below = zip(*(side.chunk(2, 1) for side in shares), strict=True)
        return Interval(*above), Interval(*below)

    def _numbers(self, shares: Interval, beside: Tensor, strictly: bool = False) -> Interval:
        """Numbers from shares `[K, X]` and their standard errors, and those of `apart` with `beside` `[X, L]` >= 0 (> 0)."""
        low, high = (share.mean(0) for share in shares)
        K, R = len(self.quadrature.nodes), self.rest
        share = _nearest_half(low, high)
        error = R * (2 * share * (1 - share) / (R + 2) / K).sqrt()
        known = [(beside > shift if strictly else beside >= shift).sum(1) for shift in (self.slack, -self.slack)]
        return Interval((R * low - error).clamp(0, R) + known[0], (R * high + error).clamp(0, R) + known[1])


def _nearest_half(low: Tensor, high: Tensor) -> Tensor:
    """The share between bounds of which the standard error is largest."""
    return torch.where(low > 0.5, low, torch.where(high < 0.5, high, 0.5)).clamp(0, 1)


def _between(low: float, high: float) -> Tensor:
    """Points from low to high, both included, in equal ratios."""
    if low <= 0:
        low = high * 1e-16
    return torch.logspace(math.log10(low), math.log10(high), TRIED, dtype=torch.float64).clamp(low, high)
