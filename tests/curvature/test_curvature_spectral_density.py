"""Stochastic Lanczos quadrature: random-matrix laws, known spectra, moments, null spaces, curves, errors, bad input."""

import math

import pytest
import torch
from known_spectra import F64, SPECTRA, MatrixFree, rotated, uniform, values
from small_networks import batch, chain, true_ggn, true_hessian
from torch import nn

from secondorder.curvature.operators import DiagonalOperator
from secondorder.curvature.spectrum import exact_density, spectral_density
from secondorder.errors import InputError, NonFiniteError


def within(estimate: tuple[float, float], truth: float, errors: float = 4, rounding: float = 1e-12) -> bool:
    """Whether an estimate is right up to a number of its standard errors."""
    return abs(estimate[0] - truth) <= errors * estimate[1] + rounding * abs(truth)


@pytest.mark.parametrize("spectrum", sorted(SPECTRA))
def test_it_is_exact_where_that_is_cheap(spectrum: str) -> None:
    truth = SPECTRA[spectrum]
    found = spectral_density(DiagonalOperator(truth))
    assert found.is_exact
    assert found.nodes[0].tolist() == sorted(truth.tolist())
    assert found.trace.error == 0.0
    assert found.zero == pytest.approx(len(truth) * torch.finfo(F64).eps * float(truth.abs().max()))
    assert not spectral_density(DiagonalOperator(truth), "lanczos", probes=2, steps=3).is_exact


def test_a_large_operator_is_not_decomposed_unless_that_is_asked_for() -> None:
    calls: list[int] = []

    class Large(MatrixFree):
        def eigenvalues(self, limit: int = 0) -> torch.Tensor:
            calls.append(self.size)
            return torch.ones(self.size, dtype=F64)

    operator = Large(torch.eye(2049, dtype=F64))
    assert not spectral_density(operator, probes=1, steps=2).is_exact
    assert calls == []
    assert spectral_density(operator, "exact").is_exact
    assert calls == [2049]


# ------------------------------------------------------------------------------------------------------- known densities


def test_wigner_semicircle() -> None:
    P = 600
    G = torch.randn(P, P, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = spectral_density(MatrixFree((G + G.mT) / math.sqrt(2 * P)), method="lanczos", probes=8, steps=60)
    for x in (-1.5, -0.5, 0.0, 0.7, 1.8):
        cumulative = 0.5 + x * math.sqrt(4 - x**2) / (4 * math.pi) + math.asin(x / 2) / math.pi
        step = 1 / 60  # what one node stands for
        assert abs(found.cumulative(x).value - cumulative) < 4 * found.cumulative(x).error + step
        assert 0 < found.cumulative(x).error < 0.015 + 2 * step  # chance, and what a node stands for here
    curve = found.curve("linear", width=0.1, points=300)
    inside = curve.eigenvalue.abs() < 1.6
    semicircle = (4 - curve.eigenvalue[inside].square()).sqrt() / (2 * math.pi)
    difference = curve.density[inside] - semicircle
    assert bool((difference.abs() < 6 * curve.density_error[inside] + 0.005).all())
    assert float(difference.square().mean().sqrt()) < 0.03
    for power, catalan in ((0, 1), (2, 1), (4, 2), (6, 5)):
        assert within(found.moment(power), catalan * P, rounding=0.02)


def test_marchenko_pastur_with_its_null_space() -> None:
    # X^T X / n with n = 200 rows and P = 500 columns: 300 zeros, the rest between (1 -+ sqrt(ratio))^2, ratio = P / n
    n, P = 200, 500
    X = torch.randn(n, P, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = spectral_density(MatrixFree(X.mT @ X / n), method="lanczos", probes=10, steps=60)
    assert within(found.zero_share, 0.6)
    assert 0 < found.zero_share.error < 0.02
    low, high = (1 - math.sqrt(P / n)) ** 2, (1 + math.sqrt(P / n)) ** 2
    beside = found.nodes[(found.weights > 1e-6) & (found.nodes.abs() > found.zero)]
    assert low - 0.1 < float(beside.min()) < float(beside.max()) < high + 0.3
    x = torch.linspace(low, high, 20001, dtype=F64)
    law = ((high - x) * (x - low)).clamp_min(0).sqrt() / (2 * math.pi * P / n * x)
    for at in (0.8, 2.0, 4.0):
        below = float(torch.trapezoid(law[x <= at], x[x <= at]))  # the law's own mass on x > 0 is n / P
        assert abs(found.cumulative(at).value - 0.6 - below) < 0.02
    curve = found.curve("linear", points=2000)
    assert float(torch.trapezoid(curve.density, curve.eigenvalue)) == pytest.approx(
        1 - found.zero_share.value, abs=1e-3
    )


# -------------------------------------------------------------------------------------------------------- known spectra


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_moments_of_known_spectra(spectrum: str) -> None:
    truth = SPECTRA[spectrum]
    found = spectral_density(MatrixFree(rotated(truth)), method="lanczos", probes=40, steps=60)
    assert found.size == len(truth)
    torch.testing.assert_close(
        found.weights.sum(1), torch.full((40,), float(len(truth)), dtype=F64), rtol=1e-12, atol=0
    )
    assert within(found.trace, float(truth.sum()))
    assert within(found.frobenius_norm, float(truth.norm()))
    assert within(found.moment(4), float((truth**4).sum()))
    assert within(found.zero_share, float((truth.abs() <= found.zero).double().mean()), rounding=1e-9)


def test_moments_are_those_of_the_probes() -> None:
    # v^T A^p v is exact for every probe up to p = 2 steps - 1, with 3 steps on 60 distinct eigenvalues
    matrix = rotated(SPECTRA["spread"])
    short, long = (spectral_density(MatrixFree(matrix), method="lanczos", probes=4, steps=steps) for steps in (3, 60))
    for power in range(6):
        assert short.moment(power).value == pytest.approx(long.moment(power).value, rel=1e-11)
    assert abs(short.moment(6).value / long.moment(6).value - 1) > 1e-4


def test_repeated_eigenvalues_are_atoms() -> None:
    truth = values([-4.0] * 30, [0.0] * 50, [1.0] * 20)  # Lanczos stops after three steps
    found = spectral_density(MatrixFree(rotated(truth)), method="lanczos", probes=20, steps=40)
    for at, share in ((-4 + 1e-9, 0.3), (-1e-9, 0.3), (0.0, 0.8), (1 - 1e-9, 0.8), (1 + 1e-9, 1.0)):
        assert within(found.cumulative(at), share)
    assert within(found.zero_share, 0.5)
    assert within(found.integral(lambda x: (x - 2).exp()), float((truth - 2).exp().sum()))


def test_standard_errors_cover() -> None:
    truth = uniform(150, -1, 2) ** 3
    operator = MatrixFree(rotated(truth))
    scores = []
    for seed in range(60):
        trace = spectral_density(operator, method="lanczos", probes=10, steps=3, seed=10 * seed).trace
        scores.append((trace.value - float(truth.sum())) / trace.error)
    z = torch.tensor(scores)
    assert float(z.abs().max()) < 5  # Student's t with 9 degrees of freedom
    assert abs(float(z.mean())) < 4 * 1.13 / math.sqrt(60)
    assert 0.7 < float(z.std()) < 1.6


def test_deflation_removes_the_error_of_large_eigenvalues() -> None:
    truth = values([1e4, 3e3, -2e3], uniform(297, 0, 1))
    operator = MatrixFree(rotated(truth))
    plain, apart = (
        spectral_density(operator, method="lanczos", probes=6, steps=20, deflate=deflate) for deflate in (0, 3)
    )
    assert within(plain.trace, float(truth.sum()))
    assert within(apart.trace, float(truth.sum()))
    assert apart.trace.error < plain.trace.error / 100
    torch.testing.assert_close(apart.weights.sum(1), torch.full((6,), 300.0, dtype=F64), rtol=1e-12, atol=0)
    assert bool((apart.weights[:, :3] == 1).all())
    assert apart.frobenius_norm.value == pytest.approx(float(truth.norm()), rel=1e-7)
    torch.testing.assert_close(
        apart.nodes[:, :3].abs(), torch.tensor([[1e4, 3e3, 2e3]] * 6, dtype=F64), rtol=1e-10, atol=0
    )
    assert float(apart.nodes[:, 3:][apart.weights[:, 3:] > 1e-9].abs().max()) < 1 + 1e-9


def test_one_after_the_other_is_as_side_by_side() -> None:
    operator = MatrixFree(rotated(SPECTRA["spread"]))
    together = spectral_density(operator, method="lanczos", probes=3, steps=10)
    apart = spectral_density(operator, method="lanczos", probes=3, steps=10, memory=14 * 60 * 8)
    assert apart.nodes.shape == together.nodes.shape
    assert abs(apart.trace.value - 30) < 3 * 5.5  # sqrt(2 (P |A|^2 - tr^2) / (P + 2) / 3 probes)
    assert len(set(apart.nodes[:, 0].tolist())) == 3
    with pytest.raises(InputError, match=r"14 float64 vectors of 60 entries take 6.3e-06 GiB, more than memory"):
        spectral_density(operator, method="lanczos", probes=3, steps=10, memory=14 * 60 * 8 - 1)


@pytest.mark.parametrize("truth_of", [true_ggn, true_hessian])
@pytest.mark.parametrize("head", ["gap", "gcp"])
def test_small_networks(head: str, truth_of) -> None:  # type: ignore[no-untyped-def]
    loss = nn.CrossEntropyLoss()
    matrix = truth_of(chain(head, nn.Tanh), loss, batch(loss))
    exact = exact_density(torch.linalg.eigvalsh(matrix), 1e-8 * float(torch.linalg.matrix_norm(matrix, 2)))
    found = spectral_density(MatrixFree(matrix), method="lanczos", probes=20, steps=100, deflate=3)
    assert within(found.trace, exact.trace.value)
    assert within(found.frobenius_norm, exact.frobenius_norm.value)
    if truth_of is true_ggn:
        assert within(found.zero_share, exact.zero_share.value)
    largest = float(matrix.diagonal().abs().max())
    for at in (-0.1 * largest, 0.01 * largest, 0.5 * largest):
        assert within(found.cumulative(at), exact.cumulative(at).value, rounding=1e-2)


def test_float32() -> None:
    truth = values([0.0] * 100, uniform(100, 1, 2))
    found = spectral_density(MatrixFree(rotated(truth).float()), method="lanczos", probes=10, steps=50)
    assert found.nodes.dtype == found.weights.dtype == F64
    assert found.zero == pytest.approx(2 * 100 * torch.finfo(torch.float32).eps, rel=1e-2)
    assert within(found.zero_share, 0.5)
    assert within(found.trace, float(truth.sum()))


def test_seeded_and_without_the_global_generator() -> None:
    operator = DiagonalOperator(uniform(50, -1, 1))
    before = torch.get_rng_state()
    first, again, other = (
        spectral_density(operator, method="lanczos", probes=2, steps=5, seed=seed) for seed in (7, 7, 8)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.nodes, again.nodes)
    assert not torch.equal(first.nodes, other.nodes)


def test_one_probe_does_not_know_its_error() -> None:
    found = spectral_density(DiagonalOperator(uniform(50, -1, 1)), method="lanczos", probes=1, steps=5)
    assert found.trace.error == found.frobenius_norm.error == found.zero_share.error == math.inf


# --------------------------------------------------------------------------------------------------------------- curves


def test_exact_density_and_its_errors() -> None:
    density = exact_density(values([-1.0, 0.0, 0.0, 1e-12, 2.0, 2.0, 3.0, 4.0]), zero=1e-10)
    assert density.trace == (pytest.approx(10.0, rel=1e-12), 0.0)
    assert density.frobenius_norm == (pytest.approx(math.sqrt(34), rel=1e-15), 0.0)
    assert density.zero_share == (3 / 8, 0.0)
    assert [density.cumulative(x).value for x in (-1.1, -1, -1e-11, 0, 2, 3.9, 4)] == [
        0,
        1 / 8,
        1 / 8,
        0.5,
        0.75,
        7 / 8,
        1,
    ]
    curve = density.curve("linear")
    assert float(curve.density_error.abs().max()) == float(curve.cumulative_error.abs().max()) == 0


@pytest.mark.parametrize("scale", ["linear", "symlog"])
def test_curves(scale: str) -> None:
    truth = values(-torch.logspace(0, -3, 50, dtype=F64), torch.logspace(1, -5, 150, dtype=F64), [0.0] * 50)
    density = exact_density(truth, 1e-9)
    curve = density.curve(scale, points=4000, linear=1e-6)
    assert float(torch.trapezoid(curve.density, curve.position)) == pytest.approx(0.8, abs=1e-4)
    assert bool((curve.cumulative.diff() >= 0).all())
    assert float(curve.cumulative[0]) == 0
    assert float(curve.cumulative[-1]) == pytest.approx(1, rel=1e-14)
    assert float(curve.eigenvalue[0]) < -1
    assert float(curve.eigenvalue[-1]) > 10
    if scale == "symlog":
        assert curve.eigenvalue[curve.position > 3].log10() + 6 == pytest.approx(
            curve.position[curve.position > 3], abs=1e-5
        )
        # 150 eigenvalues over 6 decades: 0.1 of the 250 a decade
        middle = (curve.position > 2) & (curve.position < 5.5)
        assert float((curve.density[middle] - 0.1).abs().max()) < 0.005


def test_curve_of_a_single_gaussian() -> None:
    curve = exact_density(torch.tensor([2.0]), 0.0).curve("linear", width=0.5, points=801)
    bell = torch.exp(-((curve.eigenvalue - 2) ** 2) / 0.5) / math.sqrt(math.pi / 2)
    torch.testing.assert_close(curve.density, bell, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_curves_of_every_spectrum_are_finite(spectrum: str) -> None:
    found = spectral_density(MatrixFree(rotated(SPECTRA[spectrum])), method="lanczos", probes=2, steps=10)
    for scale in ("linear", "symlog"):
        curve = found.curve(scale)
        for name in ("eigenvalue", "position", "density", "density_error", "cumulative", "cumulative_error"):
            assert bool(getattr(curve, name).isfinite().all()), name
        assert float(torch.trapezoid(curve.density, curve.position)) == pytest.approx(
            1 - found.zero_share.value, abs=2e-3
        )


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": 0}, "probes must be a whole number of at least 1, got 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"deflate": -1}, "deflate must be a whole number of at least 0, got -1"),
        ({"deflate": 20}, "deflate must be less than the number of rows, 20, got 20"),
        ({"zero": -1e-3}, "zero must be a number in [0, 1), got -0.001; relative to the largest magnitude"),
        ({"seed": 0.5}, "seed must be a whole number from 0 to 2^63 - 1, got 0.5"),
    ],
)
def test_bad_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        spectral_density(DiagonalOperator(torch.ones(20, dtype=F64)), **options)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_bad_arguments_of_results() -> None:
    density = exact_density(uniform(5, 0, 1), 0.0)
    with pytest.raises(InputError, match="unknown scale 'log'; choose one of: linear, symlog"):
        density.curve("log")
    with pytest.raises(InputError, match=r"width must be a finite number above 0, got 0\.0"):
        density.curve(width=0.0)
    with pytest.raises(InputError, match="points must be a whole number of at least 2, got 1"):
        density.curve(points=1)
    with pytest.raises(InputError, match="power must be a whole number of at least 0, got -1"):
        density.moment(-1)
    with pytest.raises(NonFiniteError, match="a product of MatrixFree"):
        spectral_density(MatrixFree(torch.full((4, 4), math.inf)))
