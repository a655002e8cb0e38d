"""Scalar functions f of an eigenvalue with stable divided differences, the derivatives of f(S) in eigencoordinates.

Index letters: a, b, c > 0 are eigenvalues (broadcastable tensors). First and second divided differences are

    f[a, b] = (f(a) - f(b)) / (a - b),    f[a, b, c] = (f[a, b] - f[b, c]) / (a - c)

(f'(a) and f''(a) / 2 where the arguments coincide). Every f here is used with f(0) = 0, see `spectral`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class ScalarFunction(Protocol):
    """What `spectral` needs of f; every method is elementwise and takes positive arguments."""

    @property
    def degree(self) -> float | None:
        """p when f(c a) = c^p f(a), else None."""

    @property
    def null_at_zero(self) -> bool:
        """Whether f is singular at 0, so that null directions are left out, as in a pseudo-inverse."""

    @property
    def factored(self) -> bool:
        """Whether f[a, b, c] = -f[a, b] f[b, c] f[a, c], which makes the second derivative three matrix products."""

    def value(self, a: Tensor) -> Tensor:
        """f(a)."""

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """f[a, b]."""

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """f[a, b, c]."""


@dataclass(frozen=True)
class SquareRoot:
    """f(l) = sqrt(l), with f[a, b] = 1 / (sqrt a + sqrt b)."""

    degree = 0.5
    null_at_zero = True
    factored = True

    def value(self, a: Tensor) -> Tensor:
        """The square root."""
        return a.sqrt()

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """The inverse of sqrt a + sqrt b: no difference of eigenvalues, no cancellation."""
        return 1 / (a.sqrt() + b.sqrt())

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """The product -f[a, b] f[b, c] f[a, c]."""
        return -self.first(a, b) * self.first(b, c) * self.first(a, c)


@dataclass(frozen=True)
class Power:
    """f(l) = l^p for a real exponent p, with f[a, b] = a^(p-1) expm1(p x) / expm1(x) at x = log(b / a)."""

    exponent: float
    null_at_zero = True
    factored = False

    @property
    def degree(self) -> float:
        """The exponent."""
        return self.exponent

    def value(self, a: Tensor) -> Tensor:
        """The power."""
        return a**self.exponent

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """No cancellation, however near the arguments are."""
        high, x = _log_ratio(a, b)
        equal = x == 0
        x = torch.where(equal, -1, x)
        ratio = torch.expm1(self.exponent * x) / torch.expm1(x)
        return high ** (self.exponent - 1) * torch.where(equal, self.exponent, ratio)

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Accurate to about eps^(3/4)."""
        p = self.exponent
        return _second_difference(
            self,
            (a, b, c),
            lambda m: p * (p - 1) * m ** (p - 2),
            lambda m: p * (p - 1) * (p - 2) * (p - 3) * m ** (p - 2),
        )


@dataclass(frozen=True)
class Logarithm:
    """f(l) = log(l) on the range (eps = 0), or log(1 + l / eps) = log(l + eps) - log(eps), which is smooth at 0."""

    eps: float = 0.0
    degree = None
    factored = False

    @property
    def null_at_zero(self) -> bool:
        """Only the plain logarithm is singular."""
        return self.eps == 0

    def value(self, a: Tensor) -> Tensor:
        """The logarithm."""
        return torch.log1p(a / self.eps) if self.eps else a.log()

    def first(self, a: Tensor, b: Tensor) -> Tensor:
        """The form x / (a expm1(x)) at x = log(b / a)."""
        high, x = _log_ratio(a + self.eps, b + self.eps)
        equal = x == 0
        x = torch.where(equal, -1, x)
        return torch.where(equal, 1, x / torch.expm1(x)) / high

    def second(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Accurate to about eps^(3/4) of the number format."""
        shifted = (a + self.eps, b + self.eps, c + self.eps)
        return _second_difference(Logarithm(), shifted, lambda m: -(m**-2), lambda m: -6 * m**-2)


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
