"""A symmetric matrix and a multiple of the identity."""

import math

import torch
from torch import Tensor

from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator
from secondorder.errors import InputError, check_number


class DampedOperator(SymmetricOperator):
    """A + lambda I of an operator A `[P, P]`: with lambda = weight decay the curvature of loss + lambda |w|^2 / 2.

    Args:
        operator: A.
        damping: lambda, a number of at least 0.

    Raises InputError for another operator or damping.
    """

    def __init__(self, operator: SymmetricOperator, damping: float) -> None:
        if not isinstance(operator, SymmetricOperator):
            raise InputError(f"a damped operator needs a symmetric operator, got {type(operator).__name__}")
        check_number("damping", damping, 0, math.inf)
        super().__init__(operator.size, operator.dtype, operator.device)
        self.operator = operator
        self.damping = float(damping)

    def _matmat(self, V: Tensor) -> Tensor:
        return self.operator @ V + self.damping * V

    def dense(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The matrix itself `[P, P]`. Raises InputError when it takes more than `limit` bytes."""
        return self.operator.dense(limit) + self.damping * torch.eye(self.size, dtype=self.dtype, device=self.device)

    def diagonal(self) -> Tensor:
        """The diagonal `[P]` of A + lambda I: that of A with lambda added."""
        return self.operator.diagonal() + self.damping

    def trace(self) -> Tensor:
        """tr(A + lambda I) = tr A + lambda P, a scalar tensor."""
        return self.operator.trace() + self.damping * self.size

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """The P eigenvalues of A + lambda I, ascending: those of A with lambda added.

        Raises InputError as A's `eigenvalues` does.
        """
        return self.operator.eigenvalues(limit) + self.damping

    def frobenius_norm(self) -> Tensor:
        """|A + lambda I|_F = sqrt(|A|_F^2 + 2 lambda tr A + lambda^2 P), a scalar tensor."""
        A, trace = self.operator.frobenius_norm(), self.operator.trace()
        return (A.square() + 2 * self.damping * trace + self.damping**2 * self.size).clamp_min(0).sqrt()
