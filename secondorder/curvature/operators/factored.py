"""A positive semi-definite matrix given by a factor."""

from torch import Tensor
from torch.nn import functional as F

from secondorder.curvature.operators.symmetric import (
    DENSE_LIMIT,
    SymmetricOperator,
    check_bytes,
    check_tensor,
    mirror_,
    norm_at_any_scale,
)
from secondorder.errors import InputError
from secondorder.matrix_power.decomposition import symmetric_eigenvalues


class FactoredOperator(SymmetricOperator):
    """rows^T rows `[P, P]` for a factor rows `[R, P]`: rank at most R, never formed when R < P.

    Raises InputError unless rows is a matrix of real floating-point numbers of at least 32 bits.
    """

    def __init__(self, rows: Tensor) -> None:
        check_tensor("a factor", rows)
        if rows.ndim != 2:
            raise InputError(f"a factor needs shape [R, P], got {list(rows.shape)}")
        super().__init__(rows.shape[1], rows.dtype, rows.device)
        self.rows = rows

    def _matmat(self, V: Tensor) -> Tensor:
        return self.rows.mT @ (self.rows @ V)

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix rows^T rows `[P, P]`, exactly symmetric. Raises InputError when it takes more than `limit` bytes."""
        self.check_dense(limit)
        return mirror_(self.rows.mT @ self.rows)

    def gram(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The smaller of rows rows^T `[R, R]` and rows^T rows `[P, P]`, which have the same non-zero eigenvalues.

        Raises InputError when it takes more than `limit` bytes.
        """
        if len(self.rows) >= self.size:
            return self.dense(limit)
        check_bytes(len(self.rows), self.dtype, limit)
        return self.rows @ self.rows.mT

    def diagonal(self) -> Tensor:
        """The diagonal `[P]` of rows^T rows: the squared norms of the columns of rows."""
        return self.rows.square().sum(0)

    def trace(self) -> Tensor:
        """tr(rows^T rows) = |rows|_F^2, a scalar tensor."""
        return self.rows.square().sum()

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """All P eigenvalues in ascending order, none negative; P - R of them are zero without being computed.

        Raises InputError when the smaller Gram matrix takes more than `limit` bytes.
        """
        values = symmetric_eigenvalues(self.gram(limit)).clamp_min(0)
        return F.pad(values, (self.size - len(values), 0))

    def frobenius_norm(self) -> Tensor:
        """|rows^T rows|_F, the norm of the smaller Gram matrix, a scalar tensor. Raises InputError as `gram` does."""
        return norm_at_any_scale(self.gram())
