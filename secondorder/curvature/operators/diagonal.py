"""A diagonal matrix."""

from torch import Tensor

from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator, check_tensor, norm_at_any_scale
from secondorder.errors import InputError


class DiagonalOperator(SymmetricOperator):
    """diag(d) `[P, P]` of entries d `[P]`.

    Raises InputError unless d is a vector of real floating-point numbers of at least 32 bits.
    """

    def __init__(self, entries: Tensor) -> None:
        check_tensor("a diagonal operator", entries)
        if entries.ndim != 1:
            raise InputError(f"a diagonal operator needs a vector [P], got shape {list(entries.shape)}")
        super().__init__(len(entries), entries.dtype, entries.device)
        self.entries = entries

    def _matmat(self, V: Tensor) -> Tensor:
        return self.entries[:, None] * V

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix diag(d) `[P, P]`. Raises InputError when it takes more than `limit` bytes."""
        self.check_dense(limit)
        return self.entries.diag()

    def diagonal(self) -> Tensor:
        """The entries d `[P]`, a copy."""
        return self.entries.clone()

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The entries d `[P]` in ascending order; `limit` is not used, since no dense matrix is built."""
        return self.entries.sort().values

    def frobenius_norm(self) -> Tensor:
        """|diag(d)|_F = |d|_2, a scalar tensor."""
        return norm_at_any_scale(self.entries)
