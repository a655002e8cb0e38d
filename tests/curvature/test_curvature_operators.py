"""Each operator against the dense matrix that it stands for."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from small_networks import relative
from torch import Tensor

from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DampedOperator,
    DenseOperator,
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.operators.difference import DifferenceOperator
from secondorder.errors import InputError


def psd(size: int) -> Tensor:
    rows = torch.randn(size + 1, size, dtype=torch.float64)
    return rows.mT @ rows


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


class ProductsOnly(SymmetricOperator):
    """Everything by the base class."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    def _matmat(self, V: Tensor) -> Tensor:
        return self.matrix @ V


def products_only() -> tuple[SymmetricOperator, Tensor]:
    A = psd(5)
    return ProductsOnly(A), A


def dense() -> tuple[SymmetricOperator, Tensor]:
    A = psd(5) - 2 * torch.eye(5).double()
    return DenseOperator(A), A


def few_rows() -> tuple[SymmetricOperator, Tensor]:
    rows = torch.randn(3, 7, dtype=torch.float64)
    return FactoredOperator(rows), rows.mT @ rows


def many_rows() -> tuple[SymmetricOperator, Tensor]:
    rows = torch.randn(9, 4, dtype=torch.float64)
    return FactoredOperator(rows), rows.mT @ rows


def diagonal() -> tuple[SymmetricOperator, Tensor]:
    d = torch.randn(6, dtype=torch.float64)
    return DiagonalOperator(d), d.diag()


def kronecker() -> tuple[SymmetricOperator, Tensor]:
    B, A = psd(3), psd(4)
    return KroneckerOperator(B, A), torch.kron(B, A)


def kronecker_of_rows() -> tuple[SymmetricOperator, Tensor]:
    B, rows = psd(3), torch.randn(2, 5, dtype=torch.float64)
    return KroneckerOperator(DenseOperator(B), FactoredOperator(rows)), torch.kron(B, rows.mT @ rows)


def eigenbasis() -> tuple[SymmetricOperator, Tensor]:
    Q_B, Q_A, scales = orthonormal(3, 3), orthonormal(4, 4), torch.rand(3, 4, dtype=torch.float64)
    Q = torch.kron(Q_B, Q_A)
    return EigenbasisOperator(Q_B, Q_A, scales), Q @ scales.flatten().diag() @ Q.mT


def incomplete_eigenbasis() -> tuple[SymmetricOperator, Tensor]:
    Q_B, Q_A, scales = orthonormal(3, 3), orthonormal(5, 2), torch.rand(3, 2, dtype=torch.float64)
    Q = torch.kron(Q_B, Q_A)
    return EigenbasisOperator(Q_B, Q_A, scales), Q @ scales.flatten().diag() @ Q.mT


def block_diagonal() -> tuple[SymmetricOperator, Tensor]:
    parts = [kronecker(), few_rows(), diagonal()]
    return BlockDiagonalOperator([o for o, _ in parts]), torch.block_diag(*[A for _, A in parts])


def difference() -> tuple[SymmetricOperator, Tensor]:
    A, B = psd(5), psd(5)
    return DifferenceOperator(DenseOperator(A), DenseOperator(B)), A - B


def damped() -> tuple[SymmetricOperator, Tensor]:
    operator, A = few_rows()
    return DampedOperator(operator, 0.3), A + 0.3 * torch.eye(len(A)).double()


CASES: list[Callable[[], tuple[SymmetricOperator, Tensor]]] = [
    products_only,
    damped,
    dense,
    few_rows,
    many_rows,
    diagonal,
    kronecker,
    kronecker_of_rows,
    eigenbasis,
    incomplete_eigenbasis,
    block_diagonal,
    difference,
]


@pytest.mark.parametrize("case", CASES)
def test_everything_equals_the_dense_matrix(case: Callable[[], tuple[SymmetricOperator, Tensor]]) -> None:
    operator, A = case()
    v, V = torch.randn(len(A), dtype=torch.float64), torch.randn(len(A), 3, dtype=torch.float64)
    assert operator.shape == A.shape
    assert relative(operator @ v, A @ v) <= 1e-13
    assert relative(operator @ V, A @ V) <= 1e-13
    assert relative(operator.dense(), A) <= 1e-13
    assert relative(operator.diagonal(), A.diagonal()) <= 1e-13
    assert relative(operator.trace(), A.trace()) <= 1e-13
    assert relative(operator.eigenvalues(), torch.linalg.eigvalsh(A)) <= 1e-12
    assert relative(operator.frobenius_norm(), torch.linalg.matrix_norm(A)) <= 1e-13


@pytest.mark.parametrize("case", CASES)
def test_scipy_sees_the_same_operator(case: Callable[[], tuple[SymmetricOperator, Tensor]]) -> None:
    operator, A = case()
    view = operator.linear_operator()
    v, V = np.random.default_rng(0).normal(size=len(A)), np.random.default_rng(1).normal(size=(len(A), 2))
    assert np.allclose(view @ v, A.numpy() @ v, rtol=1e-12, atol=1e-12)
    assert np.allclose(view @ V, A.numpy() @ V, rtol=1e-12, atol=1e-12)
    assert view.dtype == np.float64
    largest = eigsh(view, k=1, which="LA", return_eigenvectors=False)[0]
    assert largest == pytest.approx(float(torch.linalg.eigvalsh(A)[-1]), rel=1e-10)


def test_a_factor_of_few_rows_never_becomes_a_dense_matrix() -> None:
    operator = FactoredOperator(torch.randn(3, 100_000, dtype=torch.float64))
    with pytest.raises(InputError, match=r"100000 x 100000 takes 74\.5 GiB"):
        operator.dense()
    values = operator.eigenvalues()
    assert len(values) == 100_000
    assert int((values > 0).sum()) == 3
    assert float(values.sum()) == pytest.approx(float(operator.trace()), rel=1e-12)
    wide = KroneckerOperator(torch.eye(2).double(), operator)
    assert float(wide.trace()) == pytest.approx(2 * float(operator.trace()), rel=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DenseOperator(torch.ones(2, 3)), r"square matrix, got shape \[2, 3\]"),
        (lambda: FactoredOperator(torch.ones(3)), r"\[R, P\], got \[3\]"),
        (lambda: DiagonalOperator(torch.ones(2, 2)), r"vector \[P\], got shape \[2, 2\]"),
        (lambda: EigenbasisOperator(torch.eye(2), torch.eye(3), torch.ones(3, 2)), r"scales of shape \[3, 2\]"),
        (lambda: BlockDiagonalOperator([]), "got 0 kinds"),
        (lambda: DenseOperator(torch.eye(2)) @ torch.ones(3), r"\[2, 2\] cannot be multiplied by shape \[3\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()
