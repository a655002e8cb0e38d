"""Functions of a PSD matrix S through the eigenvalues of A = S / t: values, divided differences, trace term.

For eigenvalues a_i of A (`[..., n]`, ascending; those of S are l_i = t a_i) and a scale t `[..., 1]`, usually the trace:

    g_i = f(l_i),    g_ij = t f[l_i, l_j],    b_i = t df(l_i)/dtr(S) at fixed l_i (for an f with the trace in it).

S and features x are in units (`units`): S = u S', u = c^d with d = 1 for matrices and 2 for features, x = c x'. `in_units` gives
f' with f(S) = v f'(S'), v c-dependent numbers that are multiplied last.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.matrix_power.covariance import covariance_matrix
from secondorder.matrix_power.exporting import spectral_or_recorded
from secondorder.matrix_power.newton_schulz import (
    CONVERGED_STEPS,
    STABLE_STEPS,
    NewtonSchulzPolynomial,
    newton_schulz_covariance,
    newton_schulz_sqrt,
    polynomial,
)
from secondorder.matrix_power.scalar_functions import Logarithm, ScalarFunction
from secondorder.matrix_power.spectral import divided_differences, eigenvalues, left_out, null_directions
from secondorder.matrix_power.transforms import exporting
from secondorder.matrix_power.units import power, unit


class Spectrum(NamedTuple):
    """g_i `[..., n]`, g_ij `[..., n, n]`, b_i `[..., n]` (0 when f has no trace in it), and a made safe to divide by."""

    value: Tensor
    first: Tensor
    trace: Tensor
    a: Tensor


class InUnits(NamedTuple):
    """f' and the factors of f(S) = v f'(S'): v for the value, w = v / c for the gradient with respect to S (d = 1) or x (2)."""

    function: "MatrixFunction"
    value: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]


class MatrixFunction(ABC):
    """A function f of symmetric PSD matrices, by its spectrum and its plain definition: what the strategies need of it."""

    @property
    @abstractmethod
    def degree(self) -> float | None:
        """p when f(c S) = c^p f(S), else None."""

    @abstractmethod
    def spectrum(self, a: Tensor, t: Tensor, size: int) -> Spectrum:
        """The spectrum of f(S) from eigenvalues a `[..., n]` of S / t, ascending, and t `[..., 1]`.

        S has `size` rows, of whose eigenvalues a holds at least those that are not zero.
        """

    @abstractmethod
    def in_units(self, c: Tensor, d: int) -> InUnits:
        """f' with f(S) = v f'(S / c^d), and the factors of v, for units c `[..., 1, 1]` and d = 1 (matrices) or 2 (features)."""

    @abstractmethod
    def of_unit_matrix(self, S: Tensor) -> Tensor:
        """f(S) `[..., C, C]` by the plain definition, for entries of S of about 1, right to second order."""

    @abstractmethod
    def of_unit_covariance(self, x: Tensor) -> Tensor:
        """f of the covariance, `[..., C, C]`, of features x `[..., C, M]` of about 1, by the plain definition."""

    def of_matrix(self, S: Tensor) -> Tensor:
        """f(S) `[..., C, C]` by the plain definition at any scale, right to second order."""
        return _at_any_scale(lambda f, S: f.of_unit_matrix(S), self, S, 1)

    def of_covariance(self, x: Tensor) -> Tensor:
        """f of the covariance, `[..., C, C]`, of features x `[..., C, M]` at any scale, by the plain definition."""
        return _at_any_scale(lambda f, x: f.of_unit_covariance(x), self, x, 2)


def _at_any_scale(
    plain: Callable[[MatrixFunction, Tensor], Tensor], function: MatrixFunction, x: Tensor, d: int
) -> Tensor:
    """The unit counts as a constant: the result does not depend on it. A recorded program has none, so moderate scales only."""
    if exporting():
        return plain(function, x)
    c = unit(x.detach())
    scaled = function.in_units(c, d)
    return reduce(torch.mul, scaled.value, plain(scaled.function, x / c))


@dataclass(frozen=True)
class NewtonSchulz(MatrixFunction):
    """f(S) = sqrt(t) q_K(S / t), the polynomial of K steps of Newton-Schulz, negative eigenvalues of S counting as zero."""

    num_iter: int

    @property
    def degree(self) -> float:
        """1/2, that of the square root: f(c S) = sqrt(c) f(S)."""
        return 0.5

    def stable(self, dtype: torch.dtype) -> bool:
        """Whether K steps in this number format are so few that products are right and null directions need not be left out."""
        return self.num_iter <= STABLE_STEPS[dtype]

    def spectrum(self, a: Tensor, t: Tensor, size: int) -> Spectrum:
        """g, g_ij and b of the polynomial, with b = sqrt(t) (q / 2 - a q'), from the trace in the pre- and post-normalisation."""
        a = a.clamp_min(0)
        trace = a.sum(-1, keepdim=True)  # of A: 1 up to rounding when t is the trace of S
        root = (t * trace).sqrt()
        trace = torch.where(trace > 0, trace, 1)
        a = a / trace
        null = null_directions(a, size)
        safe = _divisible(a, torch.finfo(a.dtype).eps ** 2) if self.stable(a.dtype) else torch.where(null, 1, a)
        q, slope = polynomial(safe, self._steps(a.dtype))
        if not self.stable(a.dtype):
            row, column = null[..., :, None], null[..., None, :]
            ratio = q / safe
            slope = torch.where(row, torch.where(column, 0, ratio[..., None, :]), slope)
            slope = torch.where(column & ~row, ratio[..., :, None], slope)
            q, safe = torch.where(null, 0, q), torch.where(null, torch.inf, safe)
        weight = root / trace
        b = weight * torch.where(null, 0, q / 2 - a * slope.diagonal(dim1=-2, dim2=-1))
        return Spectrum(root * q, slope.mul_(weight[..., None]), b, safe * trace)

    def in_units(self, c: Tensor, d: int) -> InUnits:
        """The same polynomial with v = c^(d/2): it is homogeneous of degree 1/2."""
        return InUnits(self, power(c, d / 2), power(c, d / 2 - 1))

    def of_unit_matrix(self, S: Tensor) -> Tensor:
        """f(S) `[..., C, C]` by the iteration in plain autograd, or, for more steps than are stable, through eigenvalues."""
        if self.stable(S.dtype):
            S = S if exporting() else S + _negative_part(S.detach())  # a recorded program needs no eigenvalues for it
            return newton_schulz_sqrt(S, self.num_iter)
        return self._through_eigenvalues(S + _negative_part(S.detach()))

    def of_unit_covariance(self, x: Tensor) -> Tensor:
        """f of the covariance `[..., C, C]` of x `[..., C, M]`: by products in the smaller space, or through eigenvalues."""
        if self.stable(x.dtype):
            return newton_schulz_covariance(x, self.num_iter)
        return self._through_eigenvalues(covariance_matrix(x))

    def _through_eigenvalues(self, S: Tensor) -> Tensor:
        trace = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        live = trace > 0
        trace = torch.where(live, trace, 1)
        Y = spectral_or_recorded(S / trace, NewtonSchulzPolynomial(self._steps(S.dtype)))
        return torch.where(live, trace.sqrt() * Y, 0)

    def _steps(self, dtype: torch.dtype) -> int:
        return min(self.num_iter, CONVERGED_STEPS[dtype])


@dataclass(frozen=True)
class Spectral(MatrixFunction):
    """f(S) for a scalar function, with the convention of `spectral` for null directions."""

    function: ScalarFunction

    @property
    def degree(self) -> float | None:
        """The degree p of the scalar function, f(c a) = c^p f(a), or None."""
        return self.function.degree

    def spectrum(self, a: Tensor, t: Tensor, size: int) -> Spectrum:
        """g and g_ij of f, b = 0; zero in the null directions that f leaves out."""
        null = left_out(a * t, size, self.function)
        value, first = divided_differences(a * t, null, self.function)
        # f(a) / a and what follows from it are zero in null directions
        divisor = torch.where(null, torch.inf, _divisible(a, torch.finfo(a.dtype).eps))
        return Spectrum(value, first.mul_(t[..., None]), torch.zeros_like(a), divisor)

    def in_units(self, c: Tensor, d: int) -> InUnits:
        """f' and the factors of v by the degree of f; the logarithm keeps its unit (`Logarithm`), and v = 1 / (1 + eps / u)."""
        f = self.function
        if not isinstance(f, Logarithm):
            assert f.degree is not None
            return InUnits(self, power(c, d * f.degree), power(c, d * f.degree - 1))
        scaled = Spectral(f.in_units(c, d))
        if f.eps == 0:
            return InUnits(scaled, power(c, 0), power(c, -1))
        inverse = 1 / (c + (f.eps if d == 1 else f.eps / c))
        return InUnits(scaled, (c * inverse,), (inverse,))

    def of_unit_matrix(self, S: Tensor) -> Tensor:
        """f(S) `[..., C, C]` by the closed form through eigenvalues (`matrix_power.spectral`)."""
        return spectral_or_recorded(S, self.function)

    def of_unit_covariance(self, x: Tensor) -> Tensor:
        """f of the covariance matrix `[..., C, C]` of x `[..., C, M]` by the closed form through eigenvalues."""
        return spectral_or_recorded(covariance_matrix(x), self.function)


def _negative_part(S: Tensor) -> Tensor:
    """U diag(max(-lam, 0)) U^T, what a symmetric matrix lacks to be PSD."""
    lam, U = eigenvalues(S)
    return (U * lam.clamp_max(0).neg()[..., None, :]) @ U.mT


def _divisible(a: Tensor, level: float) -> Tensor:
    """Eigenvalues not below `level` times the largest, and 1 for the zero matrix, so that q(a) / a and the like stay finite."""
    largest = a[..., -1:]
    return torch.where(largest > 0, torch.maximum(a, level * largest), 1)
