"""The difference of two symmetric matrices."""

import torch
from torch import Tensor

from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator
from secondorder.errors import InputError


class DifferenceOperator(SymmetricOperator):
    """A - B `[P, P]` of two operators, A = `first` and B = `second`. InputError when size, number format or device differ.

    With a Hessian A and its Gauss-Newton matrix B this is what the Gauss-Newton matrix leaves out.
    """

    def __init__(self, first: SymmetricOperator, second: SymmetricOperator) -> None:
        check_same_space(first, second)
        super().__init__(first.size, first.dtype, first.device)
        self.first = first
        self.second = second

    def _matmat(self, V: Tensor) -> Tensor:
        return self.first @ V - self.second @ V

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix A - B `[P, P]`. Raises InputError when it takes more than `limit` bytes."""
        self.check_dense(limit)
        return self.first.dense(limit) - self.second.dense(limit)

    def diagonal(self) -> Tensor:
        """The diagonal `[P]` of A - B: that of A less that of B."""
        return self.first.diagonal() - self.second.diagonal()

    def trace(self) -> Tensor:
        """tr(A - B) = tr A - tr B, a scalar tensor."""
        return self.first.trace() - self.second.trace()


def check_same_space(first: SymmetricOperator, second: SymmetricOperator) -> None:
    """Raises InputError unless two operators act on the same vectors: one size, number format and device."""
    for name in ("size", "dtype", "device"):
        a, b = getattr(first, name), getattr(second, name)
        if a != b and not (name == "device" and torch.device(a).type == torch.device(b).type == "cpu"):
            raise InputError(f"two operators need the same {name}, got {a} and {b}")
