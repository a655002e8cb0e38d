"""The damped inverse for inputs so wide that A `[D, D]` is never built: A = a^T a is kept as R < D rows a `[R, D]`.

With the eigendecomposition a a^T = V diag(alpha) V^T of the Gram matrix, U = diag(alpha)^-1/2 V^T a `[R, D]` has orthonormal
rows, and A = U^T diag(alpha) U. In the range of A the inverse is that of the eigenvalues, outside it is 1 / lambda:

    P W = Q_B [ (C / (beta alpha^T + lambda)) U + (M - C U) / lambda ],    M = Q_B^T W,  C = M U^T

The gradient of the batch that made the rows lies in their range, and beta alpha / lambda can be 10^6: what rounding leaves of
it in M - C U would be larger than the first term. So it is projected out once more, and U is made in float64, block by block.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from secondorder.accelerator import check_float64
from secondorder.curvature.relative_damping import safe_scale, tikhonov
from secondorder.kfac.inverses.cholesky import shifts_of
from secondorder.kfac.inverses.diagonal import times, transposed
from secondorder.kfac.inverses.inverse import Factors, Inverse, Recipe
from secondorder.kfac.inverses.numerics import Eigen, Problem

BLOCK = 2048
"""Columns of the rows that are converted to float64 at a time."""


@dataclass(eq=False)
class WideEigenbasis(Inverse):
    """beta `[G, O]`, Q_B `[G, O, O]`, alpha `[G, R]`, U `[G, R, D]`, zero where alpha is, and the scale `[G, 1, 1]`."""

    kind = "wide_eigen"
    shapes = MappingProxyType({"beta": "GO", "Q_B": "GOO", "alpha": "GR", "U": "GRD", "scale": "G11"})
    beta: Tensor
    Q_B: Tensor
    alpha: Tensor
    U: Tensor
    scale: Tensor

    def solve(self, gradient: Tensor, damping: float, relative: bool, power: float = 1.0) -> Tensor:
        """P^p W `[G, O, D]` for the gradient W: Q_B [(C / (beta alpha^T + lambda)^p) U + (M - C U) / lambda^p].

        M = Q_B^T W, and C = M U^T its part in the range of the rows.
        """
        M = times(transposed(self.Q_B), gradient.to(self.U.dtype))
        added = self.tikhonov(damping, relative)
        eigenvalues = (self.beta[:, :, None] * self.alpha[:, None, :]).add_(added)
        if power != 1:
            added, eigenvalues = added**power, eigenvalues.pow_(power)
        return times(self.Q_B, in_range(M, self.U, eigenvalues, added)).to(gradient.dtype)

    def tikhonov(self, damping: float, relative: bool) -> Tensor | float:
        """lambda: the damping times the scale `[G, 1, 1]` of the block where it is relative, otherwise the damping itself."""
        return tikhonov(self.scale, damping, relative)


@dataclass(eq=False)
class WideCholesky(Inverse):
    """(B + rho_B I)^-1 `[G, O, O]`, alpha `[G, R]`, U `[G, R, D]`, rho = rho_A and lambda `[G, 1, 1]`.

    The damping is that of the time when it was made.
    """

    kind = "wide_cholesky"
    shapes = MappingProxyType({"B_inverse": "GOO", "alpha": "GR", "U": "GRD", "rho": "G11", "added": "G11"})
    B_inverse: Tensor
    alpha: Tensor
    U: Tensor
    rho: Tensor
    added: Tensor

    def solve(self, gradient: Tensor, damping: float, relative: bool) -> Tensor:
        """P W = (B + rho_B I)^-1 W (U^T diag(alpha) U + rho_A I)^-1 `[G, O, D]` for the gradient W; its damping is fixed."""
        M = times(self.B_inverse, gradient.to(self.U.dtype))
        return in_range(M, self.U, self.alpha[:, None, :] + self.rho, self.rho).to(gradient.dtype)

    def tikhonov(self, damping: float, relative: bool) -> Tensor:
        """lambda `[G, 1, 1]`, the damping of the time when P was made; the arguments are not used."""
        return self.added


def in_range(M: Tensor, U: Tensor, eigenvalues: Tensor, outside: Tensor | float) -> Tensor:
    """M `[G, O, D]` divided by eigenvalues `[G, O, R]` in the range of U^T, U `[G, R, D]`, and by `outside` in the rest."""
    C = M @ U.mT
    rest = torch.baddbmm(M, C, U, alpha=-1)
    left = rest @ U.mT
    return torch.baddbmm(rest.div_(outside), C / eigenvalues - left / outside, U)


def wide_eigenbasis(layer: Factors) -> Recipe:
    """The recipe of the inverse of a layer whose input factor is kept as rows, damped in its eigenbasis."""

    def make(B: Eigen, gram: Eigen) -> WideEigenbasis:
        return WideEigenbasis(*B, *input_range(layer.given, *gram), safe_scale(layer.scale))

    return Recipe([Problem(layer.B), Problem(gram_matrix(layer.given))], make)


def wide_cholesky(layer: Factors, damping: float, relative: bool) -> Recipe:
    """The recipe of the inverse of a layer whose input factor is kept as rows, each factor damped by itself."""
    rho_A, rho_B = shifts_of(layer, damping, relative)

    def make(B: tuple[Tensor], gram: Eigen) -> WideCholesky:
        return WideCholesky(*B, *input_range(layer.given, *gram), rho_A, rho_A * rho_B)

    return Recipe([Problem(layer.B, rho_B), Problem(gram_matrix(layer.given))], make)


def gram_matrix(rows: Tensor) -> Tensor:
    """a a^T `[G, R, R]` of the rows a `[G, R, D]`, in float64."""
    check_float64(rows.device, "a layer kept as rows (Options.wide_inputs)")
    gram = rows.new_zeros(*rows.shape[:2], rows.shape[1], dtype=torch.float64)
    for block in rows.split(BLOCK, -1):
        double = block.double()
        gram.baddbmm_(double, double.mT)
    return gram


def input_range(rows: Tensor, alpha: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """alpha `[G, R]` and U `[G, R, D]` from the eigenvalues and -vectors of the Gram matrix of the rows.

    Both are zero where alpha is that of rounding, so that no shape depends on the rank.
    """
    cut = rows.shape[1] * torch.finfo(torch.float64).eps * alpha[:, -1:]
    inside = alpha > cut
    T = (V * torch.where(inside, alpha.rsqrt(), 0.0)[:, None]).mT
    U = torch.empty_like(rows)
    for block, part in zip(rows.split(BLOCK, -1), U.split(BLOCK, -1), strict=True):
        part.copy_(T @ block.double())
    return torch.where(inside, alpha, 0.0).to(rows.dtype), U
