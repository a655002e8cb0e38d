"""A symmetric matrix that is stored in full."""

from torch import Tensor

from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator, check_tensor, norm_at_any_scale
from secondorder.errors import InputError


class DenseOperator(SymmetricOperator):
    """A matrix `[P, P]` as an operator. Raises InputError when it is not square; symmetry is the caller's promise."""

    def __init__(self, matrix: Tensor) -> None:
        check_tensor("a dense operator", matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"a dense operator needs a square matrix, got shape {list(matrix.shape)}")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, V: Tensor) -> Tensor:
        return self.matrix @ V

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix; it is there already, whatever the limit."""
        return self.matrix

    def diagonal(self) -> Tensor:
        """The diagonal `[P]`."""
        return self.matrix.diagonal().clone()

    def frobenius_norm(self) -> Tensor:
        """The norm of all entries."""
        return norm_at_any_scale(self.matrix)
