"""Scalar functions f of an eigenvalue with stable divided differences, the derivatives of f(S) in eigencoordinates.

Index letters: a, b, c > 0 are eigenvalues (broadcastable tensors). First and second divided differences are

    f[a, b] = (f(a) - f(b)) / (a - b),    f[a, b, c] = (f[a, b] - f[b, c]) / (a - c)

(f'(a) and f''(a) / 2 where the arguments coincide). Every f here is used with f(0) = 0, see `spectral`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


class ScalarFunction(Protocol):
    """What `spectral` needs of f; every method is elementwise and takes positive arguments."""

    @property
    def degree(self) -> float | None:
        """p when f(c a) = c^p f(a), else None."""

    def singular_at(self, level: Tensor) -> Tensor | bool:
        """Whether f is singular as seen from the rounding level: then null directions are left out, as in a pseudo-inverse."""

    @property
    def factored(self) -> bool:
        """Whether f[a, b, c] = -f[a, b] f[b, c] f[a, c], which makes the second derivative three matrix products."""

    def value(self, a: Tensor) -> Tensor:
        """f(a), elementwise, for a > 0."""

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """f[a, b] = (f(a) - f(b)) / (a - b), f'(a) where a = b: the first divided difference, elementwise."""

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """f[a, b, c] = (f[a, b] - f[b, c]) / (a - c), f''(a) / 2 where a = b = c: the second divided difference."""


@dataclass(frozen=True)
class SquareRoot:
    """f(l) = sqrt(l), with f[a, b] = 1 / (sqrt a + sqrt b)."""

    degree = 0.5
    factored = True

    def singular_at(self, level: Tensor) -> bool:
        """True: the slope of the root is infinite at zero, so null directions are left out."""
        return True

    def value(self, a: Tensor) -> Tensor:
        """sqrt(a), elementwise, for a >= 0."""
        return a.sqrt()

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """f[a, b] = 1 / (sqrt a + sqrt b): no difference of eigenvalues, no cancellation."""
        return 1 / (a.sqrt() + b.sqrt())

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """f[a, b, c] = -f[a, b] f[b, c] f[a, c], elementwise."""
        return -self.first(a, b) * self.first(b, c) * self.first(a, c)


@dataclass(frozen=True)
class Power:
    """f(l) = l^p for a real exponent p, with f[a, b] = a^(p-1) expm1(p x) / expm1(x) at x = log(b / a)."""

    exponent: float
    factored = False

    def singular_at(self, level: Tensor) -> bool:
        """True for every exponent: null directions are zero."""
        return True

    @property
    def degree(self) -> float:
        """p, the exponent: f(c a) = c^p f(a)."""
        return self.exponent

    def value(self, a: Tensor) -> Tensor:
        """a^p, elementwise, for a > 0."""
        return a**self.exponent

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """f[a, b] = b^(p-1) expm1(p x) / expm1(x) with b >= a and x = log(a / b): no cancellation for near arguments."""
        high, x = _log_ratio(a, b)
        equal = x == 0
        x = torch.where(equal, -1, x)
        ratio = torch.expm1(self.exponent * x) / torch.expm1(x)
        return high ** (self.exponent - 1) * torch.where(equal, self.exponent, ratio)

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """f[a, b, c], the second divided difference of a^p, accurate to about eps^(3/4) of the number format."""
        p = self.exponent
        return _second_difference(
            self,
            (a, b, c),
            lambda m: p * (p - 1) * m ** (p - 2),
            lambda m: p * (p - 1) * (p - 2) * (p - 3) * m ** (p - 2),
        )


@dataclass(frozen=True)
class Logarithm:
    """f(l) = log(l) on the range (eps = 0), or log(1 + l / eps) = log(l + eps) - log(eps), which is smooth at 0.

    In units u = c^`power` of the eigenvalues, with c = `unit` `[..., 1, 1]`, the argument is s = l / u and the result
    (1 + e) f(u s) at e = eps / u: neither overflows for tiny or huge u, nor does its slope in s vanish. (1 + e) is
    `in_units`'s to take back, see `spectrum`.
    """

    eps: float = 0.0
    unit: Tensor | None = None
    power: int = 1
    degree = None
    factored = False

    def in_units(self, c: Tensor, power: int) -> "Logarithm":
        """This function of eigenvalues in units c^power, with c `[..., 1, 1]`."""
        return replace(self, unit=c, power=power)

    def singular_at(self, level: Tensor) -> Tensor | bool:
        """True for eps = 0; else whether eps is below the rounding level, where null directions would be log(noise / eps)."""
        return True if self.eps == 0 else level > self._shift()

    def value(self, a: Tensor) -> Tensor:
        """log(a) for eps = 0, else log(1 + a / eps), elementwise; in units u the value at u a, for eps > 0 times 1 + eps / u."""
        if self.unit is None:
            return torch.log1p(a / self.eps) if self.eps else a.log()
        log_unit = self.power * self.unit.log()
        if self.eps == 0:
            return a.log() + log_unit
        e = self._shift().clamp_max(_large(a))  # above it log1p(s / e) (1 + e) is s
        ratio = a / e
        beyond = ratio >= _large(a)  # or not a number, where a and e are both lost in the units
        far = (a + e).log() + (log_unit - math.log(self.eps))
        return torch.where(beyond, far, torch.log1p(torch.where(beyond, 0, ratio))) * (1 + e)

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """f[a, b] = x / (h expm1(x)) at x = log(l / h) of the larger and the smaller of a + eps and b + eps, h and l."""
        e = self._shift()
        high, x = _log_ratio(a + e, b + e)
        equal = x == 0
        x = torch.where(equal, -1, x)
        return torch.where(equal, 1, x / torch.expm1(x)) * self._scale(e) / high

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """f[a, b, c], the second divided difference of the logarithm, accurate to about eps^(3/4) of the number format."""
        e = self._shift()
        scale = self._scale(e)  # the second difference is homogeneous of degree -2
        shifted = ((a + e) / scale, (b + e) / scale, (c + e) / scale)
        return _second_difference(Logarithm(), shifted, lambda m: -(m**-2), lambda m: -6 * m**-2) / scale

    def _shift(self) -> Tensor:
        """e = eps / u, up to the range of numbers."""
        if self.unit is None:
            return torch.tensor(self.eps, dtype=torch.float64)
        e = self.eps / self.unit
        return (e if self.power == 1 else e / self.unit).clamp_max(torch.finfo(e.dtype).max / 4)

    def _scale(self, e: Tensor) -> Tensor:
        return torch.ones_like(e) if self.unit is None else 1 + e


def _large(x: Tensor) -> float:
    """A number that may be multiplied by what is moderate without overflow."""
    return float(torch.finfo(x.dtype).max ** 0.75)


def _log_ratio(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The larger argument, and x = log(smaller / larger) <= 0, exact to rounding for near and for far arguments."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    gap = (low - high) / high
    near = gap > -0.5
    return high, torch.where(near, torch.log1p(torch.where(near, gap, 0)), torch.log(low / high))


def _second_difference(
    f: ScalarFunction,
    arguments: tuple[Tensor, Tensor, Tensor],
    curvature: Callable[[Tensor], Tensor],
    fourth: Callable[[Tensor], Tensor],
) -> Tensor:
    """f[a, b, c] by the recursion over the widest gap, or by Taylor's series where all three are near their mean m.

    The series is f''(m) / 2 + f''''(m) / 48 sum (x - m)^2; at a gap of eps^(1/4) m either is off by about eps^(3/4).
    `fourth` gives m^2 f''''(m) and meets ((x - m) / m)^2, because m^-4 overflows for tiny eigenvalues in float32.
    """
    low, middle, high = torch.stack(torch.broadcast_tensors(*arguments)).sort(0).values
    mean = (low + middle + high) / 3
    near = high - low <= torch.finfo(mean.dtype).eps ** 0.25 * high
    gap = torch.where(near, 1, high - low)
    far = (f.first(high, middle) - f.first(middle, low)) / gap
    spread = ((low - mean) / mean) ** 2 + ((middle - mean) / mean) ** 2 + ((high - mean) / mean) ** 2
    return torch.where(near, curvature(mean) / 2 + fourth(mean) / 48 * spread, far)
