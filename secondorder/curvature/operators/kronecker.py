"""A Kronecker product of two symmetric matrices."""

import torch
from torch import Tensor

from secondorder.curvature.operators.dense import DenseOperator
from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator
from secondorder.matrix_power.transforms import symmetric


class KroneckerOperator(SymmetricOperator):
    """B kron A `[P, P]`, P = o D, the curvature of a weight W `[o, D]` flattened row by row.

    (B kron A) vec(V) = vec(B V A): the product of size o D is never formed.

    Args:
        gradient: B `[o, o]`, a matrix or any operator.
        input: A `[D, D]`, a matrix or any operator, e.g. a FactoredOperator for an input that is too wide for a dense A.
    """

    def __init__(self, gradient: SymmetricOperator | Tensor, input: SymmetricOperator | Tensor) -> None:
        self.gradient = as_operator(gradient)
        self.input = as_operator(input)
        super().__init__(self.gradient.size * self.input.size, self.gradient.dtype, self.gradient.device)

    def _matmat(self, V: Tensor) -> Tensor:
        o, D, K = self.gradient.size, self.input.size, V.shape[1]
        BV = (self.gradient @ V.reshape(o, D * K)).view(o, D, K)
        BVA = self.input @ BV.movedim(1, 0).reshape(D, o * K)
        return BVA.view(D, o, K).movedim(0, 1).reshape(o * D, K)

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix B kron A `[P, P]`, exactly symmetric. Raises InputError when it takes more than `limit` bytes."""
        self.check_dense(limit)
        return torch.kron(symmetric(self.gradient.dense(limit)), symmetric(self.input.dense(limit)))

    def diagonal(self) -> Tensor:
        """The diagonal `[P]`, P = o D, of B kron A: B_ii A_jj in the order of (i, j)."""
        return torch.outer(self.gradient.diagonal(), self.input.diagonal()).flatten()

    def trace(self) -> Tensor:
        """tr(B kron A) = tr(B) tr(A), a scalar tensor."""
        return self.gradient.trace() * self.input.trace()

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The P = o D products of an eigenvalue of B and one of A, ascending.

        Raises InputError when the dense matrix of a factor takes more than `limit` bytes.
        """
        return torch.outer(self.gradient.eigenvalues(limit), self.input.eigenvalues(limit)).flatten().sort().values

    def frobenius_norm(self) -> Tensor:
        """|B kron A|_F = |B|_F |A|_F, a scalar tensor."""
        return self.gradient.frobenius_norm() * self.input.frobenius_norm()


def as_operator(factor: SymmetricOperator | Tensor) -> SymmetricOperator:
    """A square matrix as a `DenseOperator` (InputError for another tensor); an operator as it is."""
    return DenseOperator(factor) if isinstance(factor, Tensor) else factor
