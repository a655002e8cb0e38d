"""(A + lambda I)^-1: in closed form where the form of A gives one, else by conjugate gradients."""

import math

import torch
from torch import Tensor

from secondorder.curvature.conjugate_gradients import conjugate_gradients
from secondorder.curvature.operators.block_diagonal import BlockDiagonalOperator
from secondorder.curvature.operators.damped import DampedOperator
from secondorder.curvature.operators.dense import DenseOperator
from secondorder.curvature.operators.diagonal import DiagonalOperator
from secondorder.curvature.operators.eigenbasis import EigenbasisOperator
from secondorder.curvature.operators.factored import FactoredOperator
from secondorder.curvature.operators.kronecker import KroneckerOperator
from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator, check_bytes, decomposed
from secondorder.errors import InputError, NonFiniteError, check_number, check_whole
from secondorder.matrix_power.decomposition import symmetric_eigen


class InverseOperator(SymmetricOperator):
    """(A + lambda I)^-1 `[P, P]` by conjugate gradients: a product solves (A + lambda I) x = v for each vector v `[P]`.

    Args:
        operator: A, symmetric positive semi-definite.
        damping: lambda, at least 0.
        tolerance: a product raises InputError unless |v - (A + lambda I) x| <= tolerance |v|.
        iterations: most steps of conjugate gradients for a vector.

    Attributes:
        residual: the largest |v - (A + lambda I) x| / |v| of the latest product, computed anew from x; nan before the first.
        products: vectors that A was multiplied by, in all so far.
    """

    def __init__(self, operator: SymmetricOperator, damping: float, tolerance: float, iterations: int) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        self.operator, self.damping = operator, damping
        self.tolerance, self.iterations = tolerance, iterations
        self.residual, self.products = math.nan, 0

    def _matmat(self, V: Tensor) -> Tensor:
        solved, residual = [], 0.0
        for v in V.unbind(1):
            found = conjugate_gradients(
                self._product, v, damping=self.damping, tolerance=self.tolerance, iterations=self.iterations
            )
            if not found.converged:
                raise InputError(f"a product with (A + {self.damping:g} I)^-1 is {found.status}")
            solved.append(found.x)
            residual = max(residual, found.residual)
        self.residual = residual
        return torch.stack(solved, 1) if solved else V.clone()

    def _product(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.operator @ v


class WoodburyOperator(SymmetricOperator):
    """(R^T R + lambda I)^-1 = (I - R^T (R R^T + lambda I)^-1 R) / lambda, `[P, P]`, of a factor R with fewer rows than columns.

    Args:
        rows: R `[R, P]`.
        vectors: Q `[R, R]` of the inner inverse Q diag(inverses) Q^T = (R R^T + lambda I)^-1; `of` computes both.
        inverses: its eigenvalues `[R]`.
        damping: lambda > 0.
    """

    def __init__(self, rows: Tensor, vectors: Tensor, inverses: Tensor, damping: float) -> None:
        super().__init__(rows.shape[1], rows.dtype, rows.device)
        self.rows, self.vectors, self.inverses, self.damping = rows, vectors, inverses, damping

    @classmethod
    def of(cls, factor: FactoredOperator, damping: float) -> "WoodburyOperator":
        """(R^T R + lambda I)^-1 of a factored operator R^T R and lambda = `damping` > 0, by decomposing R R^T `[R, R]`."""
        values, vectors = symmetric_eigen(factor.rows @ factor.rows.mT)
        return cls(factor.rows, vectors, 1 / (values.clamp_min(0) + damping), damping)

    def _matmat(self, V: Tensor) -> Tensor:
        inner = self.vectors @ (self.inverses[:, None] * (self.vectors.mT @ (self.rows @ V)))
        return (V - self.rows.mT @ inner) / self.damping


def damped_inverse(
    operator: SymmetricOperator, damping: float, *, tolerance: float = 1e-6, iterations: int = 500
) -> SymmetricOperator:
    """(A + lambda I)^-1 as an operator: natural gradients, influence functions, the posterior of a Laplace approximation.

    In closed form for stored blocks (diagonal, Kronecker, eigenbasis, dense, factored) and block-diagonal ones of these: a K-FAC
    block B kron A has the inverse Q diag(1 / (b_i a_j + lambda)) Q^T. Anything else, as the blocks of `curvature_blocks` for
    "ggn" and "hessian", is solved by conjugate gradients in every product (`InverseOperator`, whose ``residual`` says how well).

    Args:
        operator: A, a symmetric operator; A + lambda I must be positive definite.
        damping: lambda, a number of at least 0 as it is, relative to nothing.
        tolerance: of conjugate gradients, |v - (A + lambda I) x| <= tolerance |v|.
        iterations: most of their steps for a vector.

    Raises:
        InputError: for other arguments, and where A + lambda I is not positive definite or the iterations do not suffice: here,
            or in the product that finds it.
        NonFiniteError: for NaN or infinity in A.
    """
    if not isinstance(operator, SymmetricOperator):
        raise InputError(f"an inverse needs a symmetric operator, got {type(operator).__name__}")
    check_number("damping", damping, 0, math.inf)
    check_number("tolerance", tolerance, 0, 1, "()")
    check_whole("iterations", iterations)
    damping = float(damping)
    if isinstance(operator, DampedOperator):
        return damped_inverse(operator.operator, operator.damping + damping, tolerance=tolerance, iterations=iterations)
    if isinstance(operator, BlockDiagonalOperator):
        inverses = [damped_inverse(b, damping, tolerance=tolerance, iterations=iterations) for b in operator.blocks]
        return BlockDiagonalOperator(inverses)
    if isinstance(operator, DiagonalOperator):
        return DiagonalOperator(_inverted(operator.entries, damping))
    if isinstance(operator, KroneckerOperator):
        (b, Q_B), (a, Q_A) = (
            decomposed(factor, "a Kronecker factor") for factor in (operator.gradient, operator.input)
        )
        return EigenbasisOperator(Q_B, Q_A, _inverted(torch.outer(b, a), damping))
    if isinstance(operator, EigenbasisOperator) and operator.scales.numel() == operator.size:
        return EigenbasisOperator(operator.gradient_basis, operator.input_basis, _inverted(operator.scales, damping))
    if isinstance(operator, FactoredOperator) and len(operator.rows) < operator.size:
        _inverted(operator.rows.new_zeros(1), damping)
        check_bytes(len(operator.rows), operator.dtype, DENSE_LIMIT)
        return WoodburyOperator.of(operator, damping)
    if isinstance(operator, DenseOperator | FactoredOperator):
        values, Q = decomposed(operator, "the matrix")
        matrix = (Q * _inverted(values, damping)) @ Q.mT
        return DenseOperator((matrix + matrix.mT) / 2)
    return InverseOperator(operator, damping, tolerance, iterations)


def _inverted(values: Tensor, damping: float) -> Tensor:
    """1 / (values + lambda) of eigenvalues. InputError unless all are positive, up to rounding of the largest."""
    if not bool(values.isfinite().all()):
        raise NonFiniteError("the operator contains NaN or infinity")
    damped = values + damping
    least = float(damped.min()) if damped.numel() else 1.0
    largest = float(damped.abs().max()) if damped.numel() else 1.0
    if least <= torch.finfo(values.dtype).eps * largest:
        raise InputError(
            f"A + {damping:g} I has an eigenvalue of {least:.3g} beside one of {largest:.3g}: not positive definite; raise the "
            "damping"
        )
    return 1 / damped
