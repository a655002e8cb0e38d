"""Functions of a PSD matrix S through the eigenvalues of A = S / t, t = tr(S): values, divided differences, trace term.

For eigenvalues a_i of A (`[..., n]`, ascending; those of S are l_i = t a_i) and the trace t `[..., 1]`:

    g_i = f(l_i),    g_ij = t f[l_i, l_j],    b_i = t df(l_i)/dt at fixed l_i (for an f with the trace in it).
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from secondorder.matrix_power.covariance import covariance_matrix
from secondorder.matrix_power.newton_schulz import newton_schulz_covariance, newton_schulz_sqrt, polynomial
from secondorder.matrix_power.scalar_functions import ScalarFunction
from secondorder.matrix_power.spectral import divided_differences, null_directions, spectral
from secondorder.matrix_power.transforms import homogeneous


class Spectrum(NamedTuple):
    """g_i `[..., n]`, g_ij `[..., n, n]`, b_i `[..., n]` (0 when f has no trace in it), and a made safe to divide by."""

    value: Tensor
    first: Tensor
    trace: Tensor
    a: Tensor


class MatrixFunction(Protocol):
    """What the fast strategies need of f."""

    def spectrum(self, a: Tensor, t: Tensor, size: int) -> Spectrum:
        """The spectrum of f(S) for a matrix S of `size` rows, of which a holds at least the nonzero eigenvalues."""

    def of_matrix(self, S: Tensor) -> Tensor:
        """The plain definition of f(S), right to second order."""

    def of_covariance(self, x: Tensor) -> Tensor:
        """The plain definition of f of the covariance of features x `[..., C, M]`."""


@dataclass(frozen=True)
class NewtonSchulz:
    """f(S) = sqrt(t) q_K(S / t), the polynomial of K steps of Newton-Schulz."""

    num_iter: int

    def spectrum(self, a: Tensor, t: Tensor, size: int) -> Spectrum:
        """With b = sqrt(t) (q / 2 - a q'), from the trace in the pre- and post-normalisation."""
        a = _divisible(a)
        q, slope = polynomial(a, self.num_iter)
        root = t.sqrt()
        b = root * (q / 2 - a * slope.diagonal(dim1=-2, dim2=-1))
        return Spectrum(root * q, slope.mul_(root[..., None]), b, a)

    def of_matrix(self, S: Tensor) -> Tensor:
        """The iteration in plain autograd."""
        return homogeneous(lambda S: newton_schulz_sqrt(S, self.num_iter), 0.5, S)

    def of_covariance(self, x: Tensor) -> Tensor:
        """The same in the smaller of the two spaces."""
        return newton_schulz_covariance(x, self.num_iter)


@dataclass(frozen=True)
class Spectral:
    """f(S) for a scalar function, with the convention of `spectral` for null directions."""

    function: ScalarFunction

    def spectrum(self, a: Tensor, t: Tensor, size: int) -> Spectrum:
        """Zero in null directions when f is singular there."""
        null = null_directions(a, size)
        value, first = divided_differences(a * t, null, self.function)
        divisor = _divisible(a)
        if self.function.null_at_zero:
            divisor = torch.where(null, torch.inf, divisor)  # f(a) / a and what follows from it are zero there
        return Spectrum(value, first.mul_(t[..., None]), torch.zeros_like(a), divisor)

    def of_matrix(self, S: Tensor) -> Tensor:
        """The closed form of `spectral`."""
        return spectral(S, self.function)

    def of_covariance(self, x: Tensor) -> Tensor:
        """The closed form on the covariance matrix."""
        return spectral(covariance_matrix(x), self.function)


def _divisible(a: Tensor) -> Tensor:
    """Eigenvalues not below rounding level, and 1 for the zero matrix, so that q(a) / a and the like stay finite."""
    largest = a[..., -1:]
    return torch.where(largest > 0, torch.maximum(a, torch.finfo(a.dtype).eps * largest), 1)
