"""A matrix that is diagonal in a Kronecker product of two orthonormal bases."""

import torch
from torch import Tensor

from secondorder.curvature.operators.symmetric import DENSE_LIMIT, SymmetricOperator, norm_at_any_scale
from secondorder.errors import InputError


class EigenbasisOperator(SymmetricOperator):
    """(Q_B kron Q_A) diag(vec(scales)) (Q_B kron Q_A)^T: the EKFAC block of a weight W `[o, D]`, flattened row by row.

    T. George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018.

    Args:
        gradient_basis: Q_B `[o, o]`, with orthonormal columns.
        input_basis: Q_A `[D, r]`, with orthonormal columns; with r < D the operator is zero on the rest.
        scales: `[o, r]`, the eigenvalues.

    Raises:
        InputError: when the shapes do not fit.
    """

    def __init__(self, gradient_basis: Tensor, input_basis: Tensor, scales: Tensor) -> None:
        if scales.shape != (gradient_basis.shape[1], input_basis.shape[1]):
            raise InputError(
                f"scales of shape {list(scales.shape)} do not fit bases of {gradient_basis.shape[1]} and "
                f"{input_basis.shape[1]} vectors"
            )
        super().__init__(len(gradient_basis) * len(input_basis), scales.dtype, scales.device)
        self.gradient_basis = gradient_basis
        self.input_basis = input_basis
        self.scales = scales

    def _matmat(self, V: Tensor) -> Tensor:
        Q_B, Q_A, scales = self.gradient_basis, self.input_basis, self.scales
        V = V.mT.reshape(-1, len(Q_B), len(Q_A))
        return (Q_B @ (scales * (Q_B.mT @ V @ Q_A)) @ Q_A.mT).flatten(1).mT

    def diagonal(self) -> Tensor:
        """The diagonal `[P]`, P = o D: entry (i, j) is sum_kl Q_B[i, k]^2 scales[k, l] Q_A[j, l]^2."""
        return (self.gradient_basis.square() @ self.scales @ self.input_basis.square().mT).flatten()

    def trace(self) -> Tensor:
        """The trace, sum_kl scales[k, l], a scalar tensor."""
        return self.scales.sum()

    def eigenvalues(self, limit: int = DENSE_LIMIT) -> Tensor:
        """All P = o D eigenvalues, ascending: the scales, and zeros where the bases are not complete; `limit` is not used."""
        return torch.cat([self.scales.flatten(), self.scales.new_zeros(self.size - self.scales.numel())]).sort().values

    def frobenius_norm(self) -> Tensor:
        """The Frobenius norm, that of the scales since the bases are orthonormal; a scalar tensor."""
        return norm_at_any_scale(self.scales)
