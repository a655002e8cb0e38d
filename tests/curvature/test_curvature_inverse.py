"""(A + lambda I)^-1 of every form of an operator, against dense inverses."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from secondorder.curvature import DampedOperator, curvature_blocks, damped_inverse
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    InverseOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.errors import InputError, NonFiniteError

F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def positive(size: int, seed: int) -> Tensor:
    rows = drawn(size + 2, size, seed=seed)
    return rows.T @ rows


def basis(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(drawn(size, size, seed=seed)).Q


FORMS: dict[str, Callable[[], SymmetricOperator]] = {
    "dense": lambda: DenseOperator(positive(7, 1)),
    "diagonal": lambda: DiagonalOperator(drawn(7, seed=2).square()),
    "kronecker": lambda: KroneckerOperator(positive(3, 3), positive(4, 4)),
    "eigenbasis": lambda: EigenbasisOperator(basis(3, 5), basis(4, 6), drawn(3, 4, seed=7).square()),
    "few rows": lambda: FactoredOperator(0.1 * drawn(3, 9, seed=8)),
    "many rows": lambda: FactoredOperator(drawn(12, 9, seed=9)),
    "damped": lambda: DampedOperator(KroneckerOperator(positive(2, 10), positive(3, 11)), 0.3),
    "blocks": lambda: BlockDiagonalOperator([FORMS["kronecker"](), FORMS["few rows"](), FORMS["diagonal"]()]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", [0.01, 10.0])
def test_closed_forms(form: str, damping: float) -> None:
    A = FORMS[form]()
    inverse = damped_inverse(A, damping)
    truth = torch.linalg.inv(A.dense() + damping * torch.eye(A.size, dtype=F64))
    V = drawn(A.size, 3, seed=12)
    assert not isinstance(inverse, InverseOperator)
    torch.testing.assert_close(inverse @ V, truth @ V, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(inverse.dense(), truth, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(inverse @ V[:, 0], truth @ V[:, 0], rtol=1e-9, atol=1e-11)


def test_bases_that_are_not_complete() -> None:
    A = EigenbasisOperator(basis(3, 5), basis(4, 6)[:, :2], drawn(3, 2, seed=7).square())
    truth = torch.linalg.inv(A.dense() + 0.5 * torch.eye(12, dtype=F64))
    torch.testing.assert_close(damped_inverse(A, 0.5, tolerance=1e-12).dense(), truth, rtol=1e-9, atol=1e-11)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def blocks(quantity: str) -> SymmetricOperator:
    return curvature_blocks(network(), nn.CrossEntropyLoss(), (drawn(6, 4), torch.arange(6) % 3), quantity).whole


def test_conjugate_gradients() -> None:
    ggn = blocks("ggn")
    inverse = damped_inverse(ggn, 0.1, tolerance=1e-10)
    assert isinstance(inverse, InverseOperator)
    assert math.isnan(inverse.residual)
    V = drawn(ggn.size, 2, seed=3)
    truth = torch.linalg.solve(ggn.dense() + 0.1 * torch.eye(ggn.size, dtype=F64), V)
    torch.testing.assert_close(inverse @ V, truth, rtol=1e-8, atol=1e-9)
    assert 0 < inverse.residual <= 1e-10
    products = inverse.products
    assert products >= 2
    inverse @ V[:, 0]
    assert inverse.products > products
    assert (inverse @ V[:, :0]).shape == (ggn.size, 0)
    loose = damped_inverse(ggn, 0.1, tolerance=0.1)
    assert isinstance(loose, InverseOperator)
    loose @ V
    assert 1e-6 < loose.residual <= 0.1


def test_kfac_of_a_network_is_inverted_in_closed_form() -> None:
    kfac = blocks("kfac_expand")
    inverse = damped_inverse(kfac, 0.01)
    truth = torch.linalg.inv(kfac.dense() + 0.01 * torch.eye(kfac.size, dtype=F64))
    torch.testing.assert_close(inverse.dense(), truth, rtol=1e-8, atol=1e-8)


def test_a_hessian_that_is_not_positive_definite() -> None:
    hessian = blocks("hessian")
    least = float(hessian.eigenvalues()[0])
    assert least < 0
    with pytest.raises(InputError, match=r"\(A \+ 0 I\)\^-1 is not converged .* not positive; raise the damping"):
        damped_inverse(hessian, 0) @ drawn(hessian.size)
    beyond = damped_inverse(hessian, 1 - least, tolerance=1e-10) @ drawn(hessian.size)
    truth = torch.linalg.solve(hessian.dense() + (1 - least) * torch.eye(hessian.size, dtype=F64), drawn(hessian.size))
    torch.testing.assert_close(beyond, truth, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("operator", "damping", "options", "message"),
    [
        (torch.eye(2), 1.0, {}, "needs a symmetric operator, got Tensor"),
        (DiagonalOperator(torch.ones(2)), -1.0, {}, "damping must be .* got -1.0"),
        (DiagonalOperator(torch.ones(2)), 1.0, {"tolerance": 0.0}, "tolerance must be .* got 0.0"),
        (DiagonalOperator(torch.ones(2)), 1.0, {"iterations": 0}, "iterations must be .* got 0"),
        (
            DiagonalOperator(torch.tensor([1.0, -2.0])),
            1.0,
            {},
            "eigenvalue of -1 beside one of 2: not positive definite",
        ),
        (DenseOperator(torch.zeros(2, 2)), 0.0, {}, "not positive definite; raise the damping"),
        (FactoredOperator(torch.ones(1, 3)), 0.0, {}, "not positive definite"),
        (KroneckerOperator(torch.eye(2), torch.diag(torch.tensor([1.0, 0.0]))), 0.0, {}, "not positive definite"),
    ],
)
def test_what_is_refused(operator: SymmetricOperator, damping: float, options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        damped_inverse(operator, damping, **options)  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_or_not_reached() -> None:
    for operator in (DiagonalOperator(torch.tensor([1.0, math.nan])), DenseOperator(torch.full((2, 2), math.inf))):
        with pytest.raises(NonFiniteError):
            damped_inverse(operator, 1.0)
    with pytest.raises(InputError, match=r"is not converged after step 2, residual .*; more iterations or damping"):
        damped_inverse(blocks("ggn"), 1e-6, iterations=2) @ drawn(43)
