"""Symmetric matrices with prescribed eigenvalues, and an operator that is known by its products only."""

import torch
from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator

F64 = torch.float64


class MatrixFree(SymmetricOperator):
    """A matrix whose numbers an estimator cannot look at; counts the vectors it is multiplied with."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix
        self.products = 0

    def _matmat(self, V: Tensor) -> Tensor:
        self.products += V.shape[1]
        return self.matrix @ V


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """Q diag(eigenvalues) Q^T with a random orthogonal Q, exactly symmetric."""
    P = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(P, P, generator=torch.Generator().manual_seed(seed), dtype=F64)).Q
    matrix = (Q * eigenvalues) @ Q.mT
    return (matrix + matrix.mT) / 2


def values(*parts: Tensor | list[float]) -> Tensor:
    """Eigenvalues joined and in ascending order."""
    return torch.cat([torch.as_tensor(part, dtype=F64) for part in parts]).sort().values


def uniform(count: int, low: float, high: float) -> Tensor:
    """`count` equally spaced eigenvalues."""
    return torch.linspace(low, high, count, dtype=F64)


SPECTRA: dict[str, Tensor] = {
    "spread": uniform(60, -1, 2),
    "repeated": values([5.0] * 7, [3.0] * 3, [-4.0] * 6, uniform(44, 0, 1)),
    "clustered": values([1 + 1e-4, 1 + 2e-4, 1 + 3e-4], uniform(57, 0, 0.9)),
    "zero": values([0.0] * 40, uniform(20, 1, 2)),
    "negative": uniform(60, -3, -1),
    "decaying": values(torch.logspace(0, -12, 60, dtype=F64)),
    "rank one": values([0.0] * 59, [2.5]),
    "multiple of one": torch.full((30,), 1.5, dtype=F64),
    "all zero": torch.zeros(20, dtype=F64),
    "size 1": torch.tensor([-3.0], dtype=F64),
    "huge": 1e30 * uniform(60, -1, 2),
    "tiny": 1e-30 * uniform(60, -1, 2),
}
