"""Derivatives of matrix square root, power and logarithm through the eigenvalues of their input.

S `[N, C, C]` has trace t and eigenvectors U; V~ = U^T sym(V) U. With the spectrum g_ij, b_i of `matrix_power.spectrum`

    J[V]   = (U (g_ij V~_ij) U^T + tr(V) U diag(b) U^T) / t,
    J^T[G] = (U (g_ij G~_ij) U^T + (sum_i b_i G~_ii) I) / t,

the same for Newton-Schulz, a polynomial of S / t, and for the exact functions, for which b = 0. Null directions of S follow the
convention of `matrix_power.spectral`, so that products with Covariance are right also where S is singular (Covariance maps the
block of two null directions to zero, and g comes from autograd).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.curvature.backpack.derivatives.base import Derivatives, inputs, random_signs
from secondorder.matrix_power.kernels import Eigen
from secondorder.matrix_power.scalar_functions import Logarithm, Power, SquareRoot
from secondorder.matrix_power.spectrum import MatrixFunction, NewtonSchulz, Spectral
from secondorder.matrix_power.strategies import OnMatrix
from secondorder.matrix_power.transforms import symmetric
from secondorder.pooling import MatrixLogarithm, MatrixPower, MatrixSquareRoot

FUNCTIONS: dict[type[nn.Module], Callable[[Any], MatrixFunction]] = {
    MatrixSquareRoot: lambda root: Spectral(SquareRoot()) if root.method == "eigh" else NewtonSchulz(root.num_iter),
    MatrixPower: lambda power: Spectral(SquareRoot() if power.exponent == 0.5 else Power(float(power.exponent))),
    MatrixLogarithm: lambda logarithm: Spectral(Logarithm(logarithm.eps)),
}
"""Module -> the function f that it computes."""


class MatrixFunctionDerivatives(Derivatives):
    """First derivatives by divided differences; R by differentiating the plain definition of f, exact to second order.

    R acts on symmetric matrices, so C (C + 1) / 2 columns hold it.
    """

    def function(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The plain definition: differentiating the module's fast `forward` twice would repeat it three times over."""
        f = FUNCTIONS[type(module)](module)
        return lambda S: f.of_matrix(symmetric(S))

    def hessian_is_zero(self, module: nn.Module) -> bool:
        """Whether the function is the first power, the only linear one."""
        return isinstance(module, MatrixPower) and module.exponent == 1

    def jacobian(self, module: nn.Module, V: Tensor) -> Tensor:
        """J V = (U (g_ij V~_ij) U^T + tr(V) U diag(b) U^T) / t `[V, N, C, C]` of matrices V of this shape, V~ = U^T sym(V) U."""
        factor, U, first, b = _spectrum(module, inputs(module))
        inner = first * (U.mT @ symmetric(V) @ U)
        inner = inner + torch.diag_embed(V.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) * b)
        return factor * (factor * (U @ inner @ U.mT))

    def transposed(self, module: nn.Module, G: Tensor, samples: list[int] | None = None) -> Tensor:
        """J^T G `[V, N, C, C]`, the pull-back of the fused head, with one eigen-decomposition for all columns G."""
        return _strategy(module).gradient(G, _spectrum(module, inputs(module, samples)))

    def basis(self, x: Tensor) -> Tensor:
        """Orthonormal symmetric matrices `[C (C + 1) / 2, C, C]`: e_i e_i^T and (e_i e_j^T + e_j e_i^T) / sqrt 2, i < j."""
        row, column = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        E = torch.zeros(len(row), *x.shape[1:], dtype=x.dtype, device=x.device)
        E[torch.arange(len(row), device=x.device), row, column] = 1.0
        return _unit(E)

    def draw(self, x: Tensor, draws: int) -> Tensor:
        """`draws` random symmetric matrices for each sample, `[draws, N, C, C]`: random signs times the basis of `basis`."""
        return _unit(random_signs(draws, x).triu())


def _strategy(module: nn.Module) -> OnMatrix:
    return OnMatrix(Eigen(FUNCTIONS[type(module)](module)))


def _spectrum(module: nn.Module, S: Tensor) -> tuple[Tensor, ...]:
    """The root of 1 / t, the unit being t (`strategies`), `[N, 1, 1]`, U and g `[N, C, C]`, b `[N, C]`."""
    return _strategy(module).forward(S)[1]


def _unit(E: Tensor) -> Tensor:
    """Upper triangular matrices made symmetric; entries 1 become matrices of unit Frobenius norm."""
    diagonal = torch.diag_embed(E.diagonal(dim1=-2, dim2=-1))
    upper = (E - diagonal) * 0.5**0.5
    return diagonal + upper + upper.mT
