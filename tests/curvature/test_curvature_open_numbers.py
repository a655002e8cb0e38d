"""What Lanczos cannot see is in the errors: known spectra in which weights, clusters and decays hide eigenvalues."""

import math

import pytest
import torch
from known_spectra import F64, MatrixFree, rotated, uniform, values
from torch import Tensor

from secondorder.curvature.operators import DenseOperator, DiagonalOperator
from secondorder.curvature.spectrum import spectral_density, spectral_summary
from secondorder.curvature.spectrum.estimate import Estimate
from secondorder.curvature.spectrum.open_numbers import _median

HIDDEN: dict[str, Tensor] = {
    "decaying through the threshold": torch.logspace(0, -12, 160, dtype=F64),
    "decaying above the threshold": torch.logspace(0, -5, 160, dtype=F64),
    "decaying into a null space": values(torch.logspace(0, -12, 60, dtype=F64), [0.0] * 100),
    "decaying on both sides": values(torch.logspace(0, -10, 80, dtype=F64), -torch.logspace(-1, -11, 80, dtype=F64)),
    "equal and zero": values([1.0] * 110, [0.0] * 50),
    "equal in truth and nearly so": values([1.0] * 55, [1 + 1e-9] * 55, [0.0] * 50),
    "two of many copies": values([3.0] * 80, [1.0] * 80),
    "all equal": torch.full((160,), 2.0, dtype=F64),
    "one tiny": values([1e-5], uniform(159, 0.5, 1)),
    "few tiny and negative": values([-1e-4] * 3, uniform(157, 0.1, 1)),
    "of low rank": values([0.0] * 152, uniform(8, 1, 2)),
    "of low rank and decaying": values([0.0] * 140, torch.logspace(0, -3, 20, dtype=F64)),
    "outlier over copies": values([100.0], [1.0] * 110, [0.0] * 49),
    "tight cluster below a gap": values(1e-3 * (1 + 1e-6 * uniform(40, 0, 1)), uniform(120, 1, 2)),
}


@pytest.mark.parametrize("spectrum", HIDDEN)
def test_errors_reach_to_the_truth(spectrum: str) -> None:
    truth = HIDDEN[spectrum]
    deflate = 8 if spectrum.startswith(("of low rank", "outlier", "decaying into")) else 0
    found = spectral_summary(DiagonalOperator(truth), "lanczos", steps=25, deflate=deflate)
    magnitudes = truth.abs().sort(descending=True).values
    beyond = magnitudes[magnitudes > 1e-8 * magnitudes[0]]
    condition = float(magnitudes[0] / beyond[-1])
    # a bound: eigenvalues that were seen, and those that no probe excludes
    assert abs(found.condition.value - condition) <= found.condition.error + 1e-9 * condition
    # a standard error in part, so several
    assert abs(found.rank.value - len(beyond)) <= 4 * found.rank.error + 1e-9
    middle = magnitudes[0] / beyond.sort().values[(len(beyond) - 1) // 2 : len(beyond) // 2 + 1]
    value, error = found.median_condition
    assert float((middle - value).abs().min()) <= error + 1e-9 * value
    if spectrum in ("all equal", "equal and zero", "outlier over copies"):
        assert error <= 1e-6 * value
    for name, extreme in (("largest", truth.max()), ("smallest", truth.min())):
        value, error = getattr(found, name)
        assert abs(value - float(extreme)) <= error + 1e-12 * float(magnitudes[0]), name


@pytest.mark.parametrize("spectrum", ["few tiny and negative", "one tiny", "tight cluster below a gap"])
def test_the_error_of_the_median_covers_every_draw_of_probes(spectrum: str) -> None:
    """The spread over probes is too little: Lanczos does not tell where between two of its nodes the median lies."""
    magnitudes = HIDDEN[spectrum].abs().sort().values
    truth = magnitudes[-1] / magnitudes[79:81]
    for seed in (0, 2, 7):  # of ten those where it is farthest off: 1.5 to 3 standard errors by the spread
        found = spectral_summary(DiagonalOperator(HIDDEN[spectrum]), "lanczos", steps=25, seed=seed).median_condition
        assert float((truth - found.value).abs().min()) <= found.error
        assert found.error <= 0.3 * found.value


@pytest.mark.parametrize("spectrum", HIDDEN)
def test_the_median_lies_between_both_ends(spectrum: str) -> None:
    """An error reaches to the farther one and does not show the other."""
    truth = HIDDEN[spectrum]
    density = spectral_density(DiagonalOperator(truth), method="lanczos", steps=25, zero=1e-8)
    magnitudes = truth.abs()[truth.abs() > 1e-8 * truth.abs().max()].sort().values
    least, most = magnitudes[-1] / magnitudes[[(len(magnitudes)) // 2, (len(magnitudes) - 1) // 2]]
    assert density.bounds is not None
    low, high = density.bounds.beyond(torch.tensor([density.zero], dtype=F64))
    ends = _median(density, density.bounds, Estimate(float(magnitudes[-1]), 0.0), (float(low), float(high)))
    assert ends[0] <= float(most) * (1 + 1e-9)
    assert ends[1] >= float(least) * (1 - 1e-9)


@pytest.mark.parametrize("spectrum", HIDDEN)
def test_shares_within_their_errors(spectrum: str) -> None:
    truth = HIDDEN[spectrum]
    found = spectral_density(DiagonalOperator(truth), method="lanczos", probes=6, steps=20)
    zero = 1e-8 * float(truth.abs().max())
    want = float((truth.abs() <= zero).double().mean())
    assert abs(found.zero_share.value - want) <= 4 * found.zero_share.error + 1e-12
    for point in (-1e-3, -1e-6, 0.0, 1e-6, 1e-4, 1e-2, 0.7):
        rounded = torch.where(truth.abs() <= zero, 0, truth)
        want = float((rounded <= point).double().mean())
        assert abs(found.cumulative(point).value - want) <= 4 * found.cumulative(point).error + 1e-12, point
    curve = found.curve("symlog", points=50)
    exact = torch.stack([(rounded <= x).double().mean() for x in curve.eigenvalue])
    assert bool(((curve.cumulative - exact).abs() <= 4 * curve.cumulative_error + 1e-12).all())


def test_errors_are_small_where_lanczos_sees_everything() -> None:
    found = spectral_summary(DiagonalOperator(HIDDEN["of low rank"]), "lanczos")
    assert found.rank.value == pytest.approx(8, abs=1e-6)
    assert found.rank.error < 1e-6
    assert found.condition.error < 1e-4
    gap = spectral_summary(DiagonalOperator(values([1e-3], uniform(159, 0.5, 1))), "lanczos")
    assert gap.rank.error < 1e-6
    assert gap.condition.error < 1
    null = spectral_summary(DiagonalOperator(HIDDEN["equal and zero"]), "lanczos")
    assert 1 < null.rank.error < 6  # chance alone: sqrt(2 n (R - n) / (R + 2) / probes)
    assert null.condition.error < 1e-4


def test_an_extreme_that_has_not_converged_may_be_passed() -> None:
    truth = values(torch.logspace(-6, 0, 150, dtype=F64))
    for steps in (4, 8, 16):
        bounds = spectral_density(DiagonalOperator(truth), method="lanczos", probes=10, steps=steps).bounds
        assert bounds is not None
        low, high = float(bounds.quadrature.nodes.min()), float(bounds.quadrature.nodes.max())
        assert low - float(truth[0]) <= bounds.reach(low, upwards=False) < 0.5
        assert float(truth[-1]) - high <= bounds.reach(high, upwards=True) < 0.5


def test_one_probe_knows_no_error() -> None:
    found = spectral_summary(DiagonalOperator(HIDDEN["one tiny"]), "lanczos", probes=1, steps=10, deflate=0)
    assert found.rank.error == found.condition.error == found.median_condition.error == math.inf


def test_a_decomposition_leaves_in_doubt_what_it_rounds() -> None:
    low_rank = rotated(values([0.0] * 40, uniform(20, 1, 2)))
    sure, unsure = (spectral_summary(DenseOperator(low_rank), threshold=t) for t in (None, 0.0))
    assert sure.rank == (20, 0)
    assert sure.condition.error == 0
    assert abs(unsure.rank.value - 20) <= unsure.rank.error
    assert abs(unsure.condition.value - 2) <= unsure.condition.error
    known = spectral_summary(DiagonalOperator(values([0.0] * 40, uniform(20, 1, 2))), threshold=0.0)
    assert known.rank == (20, 0)


def test_bounds_hold_for_every_point_and_probe() -> None:
    """Chebyshev, Markov and Stieltjes: of each probe's own measure, whatever the spectrum, also in float32."""
    for truth in (HIDDEN["decaying on both sides"], HIDDEN["tight cluster below a gap"]):
        for dtype, rounding in ((F64, 1e-12), (torch.float32, 1e-7)):  # of masses, where products are rounded
            operator = MatrixFree(truth.diag().to(dtype))
            found = spectral_density(operator, method="lanczos", probes=3, steps=15).bounds
            assert found is not None
            v = torch.randn(160, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
            masses = (v / v.norm(dim=0)).square().mT
            x = torch.cat([truth[::13], truth[::13] * 1.3, -truth[::13]])
            true_shares = torch.stack([masses[:, truth <= point].sum(1) for point in x], 1)
            low, high = found.shares(x)
            assert bool((low <= true_shares + rounding).all())
            assert bool((high >= true_shares - rounding).all())
    low, high = found.shares(torch.tensor([0.1, 0.5], dtype=F64))  # a gap
    assert float((high - low).max()) < 1e-3
