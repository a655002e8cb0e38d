"""Hutchinson, Hutch++ and exact traces, norms and diagonals: known values, coverage, products, structures, bad input."""

import math
from collections.abc import Callable

import pytest
import torch
from known_spectra import F64, SPECTRA, MatrixFree, rotated, uniform, values
from torch import Tensor

from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.spectrum import Estimate, diagonal_estimate, frobenius_norm_estimate, trace_estimate
from secondorder.errors import InputError, NonFiniteError

STOCHASTIC = [("hutchinson", "rademacher"), ("hutchinson", "gaussian"), ("hutch++", "gaussian")]


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=F64)).Q


def psd(size: int) -> Tensor:
    X = torch.randn(size, size, dtype=F64)
    return X @ X.mT


OPERATORS: dict[str, Callable[[], SymmetricOperator]] = {
    "dense": lambda: DenseOperator(rotated(uniform(100, -1, 2))),
    "factored": lambda: FactoredOperator(torch.randn(70, 150, dtype=F64)),
    "diagonal": lambda: DiagonalOperator(torch.randn(150, dtype=F64)),
    "kronecker": lambda: KroneckerOperator(psd(5), psd(7)),
    "factored kronecker": lambda: KroneckerOperator(
        DenseOperator(psd(5)), FactoredOperator(torch.randn(3, 9, dtype=F64))
    ),
    "eigenbasis": lambda: EigenbasisOperator(orthonormal(5, 5), orthonormal(9, 4), torch.rand(5, 4, dtype=F64)),
    "blocks": lambda: BlockDiagonalOperator([KroneckerOperator(psd(3), psd(4)), DenseOperator(psd(6))]),
    "matrix-free": lambda: MatrixFree(rotated(uniform(150, -1, 2))),
}


@pytest.mark.parametrize("structure", OPERATORS)
def test_exact(structure: str) -> None:
    operator = OPERATORS[structure]()
    dense = operator @ torch.eye(operator.size, dtype=F64)
    trace, norm, diagonal = (f(operator, "exact") for f in (trace_estimate, frobenius_norm_estimate, diagonal_estimate))
    assert trace == (pytest.approx(float(dense.trace()), rel=1e-12), 0)
    assert norm == (pytest.approx(float(dense.norm()), rel=1e-12), 0)
    torch.testing.assert_close(diagonal.value, dense.diagonal(), rtol=1e-12, atol=1e-12)
    assert float(diagonal.error.abs().max()) == 0
    if structure != "matrix-free":
        assert trace_estimate(operator) == trace


@pytest.mark.parametrize(("method", "distribution"), STOCHASTIC)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_known_spectra(spectrum: str, method: str, distribution: str) -> None:
    truth = SPECTRA[spectrum]
    operator = MatrixFree(rotated(truth))
    options = {"probes": 25, "distribution": distribution, "seed": 1}
    trace = trace_estimate(operator, method, **options)  # type: ignore[arg-type]
    norm = frobenius_norm_estimate(operator, method, **options)  # type: ignore[arg-type]
    diagonal = diagonal_estimate(operator, method, **options)  # type: ignore[arg-type]
    scale = float(truth.abs().sum()) * 1e-12
    assert abs(trace.value - float(truth.sum())) <= 4 * trace.error + scale
    assert abs(norm.value - float(truth.norm())) <= 4 * norm.error + scale
    wrong = (diagonal.value - operator.matrix.diagonal()).abs() > 5 * diagonal.error + scale
    assert int(wrong.sum()) == 0


@pytest.mark.parametrize(("method", "distribution"), STOCHASTIC)
def test_standard_errors_cover(method: str, distribution: str) -> None:
    truth = values(3 * torch.logspace(0, -2, 100, dtype=F64), uniform(100, -0.1, 0))
    operator = MatrixFree(rotated(truth))
    goals: dict[Callable[..., Estimate], float] = {
        trace_estimate: float(truth.sum()),
        frobenius_norm_estimate: float(truth.norm()),
    }
    for estimate, goal in goals.items():
        found = [estimate(operator, method, probes=20, distribution=distribution, seed=seed) for seed in range(60)]
        z = torch.tensor([(value - goal) / error for value, error in found])
        assert float(z.abs().max()) < 5
        assert abs(float(z.mean())) < 0.6
        assert 0.6 < float(z.std()) < 1.6


def test_diagonal_errors_cover() -> None:
    operator = MatrixFree(rotated(torch.logspace(0, -3, 200, dtype=F64)))
    for method, distribution in STOCHASTIC:
        found = diagonal_estimate(operator, method, probes=40, distribution=distribution)
        z = (found.value - operator.matrix.diagonal()) / found.error
        assert 0.8 < float(z.std()) < 1.3
        assert abs(float(z.mean())) < 0.4


def test_a_sketch_is_better_for_decaying_eigenvalues() -> None:
    truth = torch.logspace(0, -30, 300, dtype=F64)
    operator = MatrixFree(rotated(truth))
    goal = float(truth.sum())
    plain = trace_estimate(operator, "hutchinson", probes=100)
    assert operator.products == 100
    sketched = trace_estimate(operator, "hutch++", probes=33)
    assert operator.products == 199
    assert abs(sketched.value - goal) < abs(plain.value - goal) / 50
    assert sketched.error < plain.error / 50
    # a rank below the number of probes is met exactly
    low_rank = MatrixFree(rotated(values([0.0] * 280, uniform(20, -1, 1))))
    exact = trace_estimate(low_rank, "hutch++", probes=25)
    assert abs(exact.value) < 1e-13
    assert exact.error < 1e-13
    norm = frobenius_norm_estimate(low_rank, "hutch++", probes=25)
    assert norm.value == pytest.approx(float(low_rank.matrix.norm()), rel=1e-12)
    diagonal = diagonal_estimate(low_rank, "hutch++", probes=25)
    torch.testing.assert_close(diagonal.value, low_rank.matrix.diagonal(), rtol=0, atol=1e-13)


def test_rademacher_is_exact_on_diagonal_matrices() -> None:
    operator = MatrixFree(torch.randn(200, dtype=F64).diag())
    found = trace_estimate(operator, "hutchinson", probes=2)
    assert found.value == pytest.approx(float(operator.matrix.trace()), rel=1e-12)
    assert found.error < 1e-12
    assert trace_estimate(operator, "hutchinson", probes=2, distribution="gaussian").error > 0.1


def test_small_operators_are_exact() -> None:
    operator = MatrixFree(rotated(uniform(40, 0, 1)))
    assert trace_estimate(operator, "hutch++", probes=14) == (pytest.approx(20.0, rel=1e-13), 0)
    assert operator.products == 40
    assert trace_estimate(operator, "hutch++", probes=13).error > 0


def test_float32_sums_in_float64() -> None:
    entries = torch.full((100_000,), 0.1)
    entries[0] = 1e8  # a float32 sum would lose the rest
    goal = float(entries.double().sum())
    assert trace_estimate(DiagonalOperator(entries)).value == pytest.approx(goal, rel=1e-14)
    assert frobenius_norm_estimate(DiagonalOperator(entries * 1e25)).value == pytest.approx(1e33, rel=1e-6)
    operator = MatrixFree(rotated(uniform(200, 0, 1)).float())
    found = trace_estimate(operator, "hutch++", probes=20)
    assert abs(found.value - 100) < 4 * found.error
    assert diagonal_estimate(operator, "hutch++", probes=20).value.dtype == F64


def test_seeded_and_without_the_global_generator() -> None:
    operator = MatrixFree(rotated(uniform(200, 0, 1)))
    before = torch.get_rng_state()
    for method, distribution in STOCHASTIC:
        first, again, other = (
            trace_estimate(operator, method, probes=3, distribution=distribution, seed=seed) for seed in (5, 5, 6)
        )
        assert first == again
        assert first != other
    assert torch.equal(before, torch.get_rng_state())


def test_one_probe_does_not_know_its_error() -> None:
    operator = MatrixFree(rotated(uniform(200, 0, 1)))
    for method in ("hutchinson", "hutch++"):
        assert trace_estimate(operator, method, probes=1).error == math.inf
        assert frobenius_norm_estimate(operator, method, probes=1).error == math.inf


@pytest.mark.parametrize("estimate", [trace_estimate, frobenius_norm_estimate, diagonal_estimate])
def test_bad_input(estimate: Callable[..., object]) -> None:
    operator = MatrixFree(rotated(uniform(100, 0, 1)))
    for options, message in [
        ({"method": "hutch"}, "unknown method 'hutch'; choose one of: auto, exact, hutchinson, hutch++"),
        ({"probes": 0}, "probes must be a whole number of at least 1, got 0"),
        ({"probes": True}, "probes must be a whole number of at least 1, got True"),
        ({"distribution": "normal"}, "unknown distribution 'normal'; choose one of: rademacher, gaussian"),
        ({"seed": -3}, "seed must be a whole number from 0 to 2^63 - 1, got -3"),
        (
            {"memory": 1000},
            "80 float64 vectors of 100 entries take 6e-05 GiB, more than memory = 9.3e-07 GiB; take fewer probes, a "
            "smaller block, or raise memory",
        ),
    ]:
        with pytest.raises(InputError) as error:
            estimate(operator, **options)
        assert str(error.value) == message
    broken = torch.eye(100, dtype=F64)
    broken[3, 3] = math.nan
    for bad in (MatrixFree(broken), DenseOperator(broken)):
        for method in ("exact", "hutchinson", "hutch++"):
            with pytest.raises(NonFiniteError, match="non-finite entries; check the network's values, or use float64"):
                estimate(bad, method)
