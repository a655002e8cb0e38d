"""A symmetric matrix that is stored in full."""

from torch import Tensor

from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator, check_tensor, norm_at_any_scale
from secondorder.errors import InputError


class DenseOperator(SymmetricOperator):
    """A stored matrix `[P, P]` as an operator; its symmetry is the caller's promise and not checked.

    Raises InputError unless it is a square matrix of real floating-point numbers of at least 32 bits.
    """

    def __init__(self, matrix: Tensor) -> None:
        check_tensor("a dense operator", matrix)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InputError(f"a dense operator needs a square matrix, got shape {list(matrix.shape)}")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, V: Tensor) -> Tensor:
        return self.matrix @ V

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The stored matrix `[P, P]` itself, no copy; `limit` is not used, since nothing is allocated."""
        return self.matrix

    def diagonal(self) -> Tensor:
        """The diagonal `[P]` of the stored matrix, a copy."""
        return self.matrix.diagonal().clone()

    def frobenius_norm(self) -> Tensor:
        """|A|_F, the root of the sum of the stored matrix's squared entries, a scalar tensor."""
        return norm_at_any_scale(self.matrix)
