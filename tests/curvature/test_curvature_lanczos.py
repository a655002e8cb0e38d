"""Extreme eigenvalues by Lanczos: known spectra, SciPy, multiplicities, restarts, residual bounds, bad input."""

import math
from contextlib import nullcontext

import pytest
import scipy.sparse.linalg
import torch
from known_spectra import F64, SPECTRA, MatrixFree, rotated, uniform, values
from small_networks import batch, chain, true_ggn, true_hessian
from torch import nn

from secondorder.curvature.operators import DenseOperator, DiagonalOperator
from secondorder.curvature.spectrum import products, top_eigenvalues
from secondorder.curvature.spectrum.krylov_basis import KrylovBasis
from secondorder.errors import InputError, NonFiniteError

ORDERS = {
    "largest": lambda v: v.sort(descending=True).values,
    "smallest": lambda v: v.sort().values,
    "magnitude": lambda v: v[v.abs().argsort(descending=True)],
}


@pytest.mark.parametrize("which", ORDERS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_known_spectra(spectrum: str, which: str) -> None:
    truth = ORDERS[which](SPECTRA[spectrum])
    k = min(8, len(truth))
    scale = float(truth.abs().max())
    found = top_eigenvalues(MatrixFree(rotated(truth)), k, which, tolerance=1e-12)
    assert found.converged.all()
    compared = (found.values.abs(), truth[:k].abs()) if which == "magnitude" else (found.values, truth[:k])
    assert float((compared[0] - compared[1]).abs().max()) <= 1e-12 * scale
    assert float((found.vectors.mT @ found.vectors - torch.eye(k, dtype=F64)).abs().max()) < 1e-13
    assert float(found.residuals.max()) <= 1e-12 * scale


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_large_matrix_with_restarts(which: str) -> None:
    # 1200 rows, 63 basis vectors: the close upper and lower ends need restarts
    truth = uniform(1200, -1, 1).sign() * uniform(1200, -1, 1).abs() ** 0.7
    operator = MatrixFree(rotated(truth))
    found = top_eigenvalues(operator, 3, which)
    assert found.products == operator.products > 200
    assert found.converged.all()
    torch.testing.assert_close(found.values, ORDERS[which](truth)[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        found.residuals,
        (operator.matrix @ found.vectors - found.vectors * found.values).norm(dim=0),
        rtol=1e-6,
        atol=1e-14,
    )


def test_as_scipy() -> None:
    torch.manual_seed(0)
    images, labels = batch(nn.CrossEntropyLoss())
    matrix = true_hessian(chain("gcp", nn.Tanh), nn.CrossEntropyLoss(), (images, labels))
    operator = DenseOperator(matrix)
    for which, name in (("largest", "LA"), ("smallest", "SA"), ("magnitude", "LM")):
        found = top_eigenvalues(operator, 5, which)
        eigsh = scipy.sparse.linalg.eigsh(operator.linear_operator(), 5, which=name, return_eigenvectors=False)
        torch.testing.assert_close(
            found.values.sort().values, torch.as_tensor(eigsh).sort().values, rtol=1e-10, atol=1e-13
        )
        dense = ORDERS[which](torch.linalg.eigvalsh(matrix))[:5]
        torch.testing.assert_close(found.values, dense, rtol=1e-11, atol=1e-13)


def test_gauss_newton_of_a_network() -> None:
    torch.manual_seed(1)
    data = batch(nn.CrossEntropyLoss())
    matrix = true_ggn(chain("covariance"), nn.CrossEntropyLoss(), data)
    found = top_eigenvalues(MatrixFree(matrix), 9)  # rank N (K - 1) = 6: three more are zero
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(matrix).flip(0)[:9], rtol=1e-11, atol=1e-14)
    assert float(found.values[5]) > 1e-6
    assert float(found.values[6:].abs().max()) < 1e-14


@pytest.mark.parametrize("block", [1, 2, 5])
def test_copies_beyond_the_block_are_found(block: int) -> None:
    truth = values([2.0] * 6, uniform(294, 0, 1))
    found = top_eigenvalues(MatrixFree(rotated(truth)), 7, block=block)
    torch.testing.assert_close(found.values, truth.flip(0)[:7], rtol=1e-12, atol=0)


def test_a_copy_that_scipy_misses() -> None:
    operator = DiagonalOperator(values([3.0, 2.0, 2.0, 1.9], uniform(1996, 0, 1)))
    for seed in range(3):
        assert top_eigenvalues(operator, 3, seed=seed).values.tolist() == pytest.approx([3, 2, 2], rel=1e-12)


def test_residuals_are_bounds_before_convergence() -> None:
    truth = uniform(400, 0, 1)
    found = top_eigenvalues(MatrixFree(rotated(truth)), 4, max_iterations=20)
    assert not found.converged.any()
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert 0 < float((truth - value).abs().min()) <= float(residual)


def test_a_looser_tolerance_costs_less() -> None:
    matrix = rotated(uniform(500, 0, 1) ** 3)
    loose, tight = (top_eigenvalues(MatrixFree(matrix), 4, tolerance=t) for t in (1e-3, 1e-10))
    assert loose.products < tight.products
    assert float(tight.residuals.max()) <= 1e-10 < float(loose.residuals.max()) <= 1e-3


def test_float32_products_float64_vectors() -> None:
    truth = values([30.0, 20.0, 10.0], uniform(297, -1, 1))
    found = top_eigenvalues(MatrixFree(rotated(truth).float()), 3)
    assert found.values.dtype == found.vectors.dtype == F64
    assert found.converged.all()
    torch.testing.assert_close(found.values, truth.flip(0)[:3], rtol=1e-5, atol=0)
    assert float((found.vectors.mT @ found.vectors - torch.eye(3, dtype=F64)).abs().max()) < 1e-13


def test_seeded_and_without_the_global_generator() -> None:
    operator = DiagonalOperator(uniform(200, -1, 1))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (top_eigenvalues(operator, 2, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=0, atol=1e-13)


def test_memory_bounds_the_basis() -> None:
    truth = values([1.02, 1.04, 1.06], uniform(1997, 0, 1))
    memory = 2 * (3 + 3) * 2000 * 8  # the least that is accepted
    found = top_eigenvalues(DiagonalOperator(truth), 3, memory=memory)
    assert found.products > 200  # 33 times what fits
    torch.testing.assert_close(found.values, truth.flip(0)[:3], rtol=1e-11, atol=0)
    with pytest.raises(InputError, match=r"12 float64 vectors of 2000 entries take 0\.00018 GiB, more than memory"):
        top_eigenvalues(DiagonalOperator(truth), 3, memory=memory - 1)


def test_without_a_budget_the_basis_may_take_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, least = DiagonalOperator(uniform(2000, 0, 1)), 2 * (3 + 3) * 2000 * 8
    for minimum, free, fits in ((1, least, True), (1, least - 1, False), (least, 1, True)):
        monkeypatch.setattr(products, "MEMORY", minimum)
        monkeypatch.setattr(products, "budget", lambda memory, device, free=free: free)
        with nullcontext() if fits else pytest.raises(InputError, match=r"12 float64 vectors .* more than memory"):
            top_eigenvalues(operator, 3, max_iterations=3)


def test_basis_relation() -> None:
    # A Q = Q T + newest vectors, through a breakdown (5 distinct eigenvalues) and a restart
    truth = values([1.0] * 20, [2.0] * 20, [3.0] * 20, [4.0] * 20, [5.0] * 20)
    basis = KrylovBasis(MatrixFree(rotated(truth)), 40, 2, torch.Generator().manual_seed(0))
    for step in range(20):
        if step == 10:
            pairs = basis.ritz()
            basis.restart(pairs.values[:6], pairs.coefficients[:, :6], fresh=False)
        basis.expand()
        Q, T = basis.Q[: basis.count], basis.T[: basis.count, : basis.done]
        torch.testing.assert_close(Q @ Q.mT, torch.eye(basis.count, dtype=F64), rtol=0, atol=1e-13)
        AQ = basis.operator @ basis.Q[: basis.done].mT
        torch.testing.assert_close(AQ, Q.mT @ T, rtol=0, atol=1e-11)
        if basis.full:
            break
    assert step > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 21}, "k must be at most the number of rows, 20, got 21"),
        ({"k": 0}, "k must be a whole number of at least 1, got 0"),
        ({"k": 2.0}, "k must be a whole number of at least 1, got 2.0"),
        ({"k": 2, "which": "biggest"}, "unknown order 'biggest'; choose one of: largest, smallest, magnitude"),
        ({"k": 2, "tolerance": -1.0}, "tolerance must be a finite number above 0, got -1.0"),
        ({"k": 2, "tolerance": math.nan}, "tolerance must be a finite number above 0, got nan"),
        ({"k": 2, "block": 0}, "block must be a whole number of at least 1, got 0"),
        ({"k": 9, "max_iterations": 2, "block": 4}, "2 products of 4 vectors cannot give 9 eigenvalues; raise either"),
        ({"k": 2, "seed": -1}, "seed must be a whole number from 0 to 2^63 - 1, got -1"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        top_eigenvalues(DiagonalOperator(torch.ones(20, dtype=F64)), **options)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_bad_operators() -> None:
    with pytest.raises(InputError, match="needs a SymmetricOperator, got Tensor; wrap a matrix in DenseOperator"):
        top_eigenvalues(torch.eye(3), 1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one row, got size 0"):
        top_eigenvalues(DiagonalOperator(torch.ones(0)), 1)
    broken = MatrixFree(torch.full((9, 9), math.nan))
    with pytest.raises(
        NonFiniteError, match=r"a product of MatrixFree \(9 rows, torch.float32\) has 9 non-finite entries"
    ):
        top_eigenvalues(broken, 1)
