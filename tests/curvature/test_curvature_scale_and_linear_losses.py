"""Losses that have no Gauss-Newton matrix say so; eigenvalues near the ends of the numbers are as right as others."""

import math
from collections.abc import Callable

import pytest
import torch
from known_spectra import F64, MatrixFree, rotated, uniform, values
from small_networks import relative, true_ggn, true_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks, fidelity, half_rank_condition, relative_difference
from secondorder.curvature.operators import (
    BlockDiagonalOperator,
    DenseOperator,
    DiagonalOperator,
    EigenbasisOperator,
    FactoredOperator,
    KroneckerOperator,
    SymmetricOperator,
)
from secondorder.curvature.spectrum import (
    frobenius_norm_estimate,
    spectral_density,
    spectral_summary,
    top_eigenvalues,
    trace_estimate,
)
from secondorder.errors import InputError, NonFiniteError

N, K = 6, 3
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2])


def network(*end: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, K), *end).double()


def targets() -> Tensor:
    return torch.randn(N, K, dtype=F64)


LINEAR: dict[str, tuple[nn.Module, Callable[..., Tensor], Callable[[], Tensor]]] = {
    "NLLLoss": (network(nn.LogSoftmax(1)), nn.NLLLoss(), lambda: CLASSES),
    "nll_loss": (network(nn.LogSoftmax(1)), F.nll_loss, lambda: CLASSES),
    "KLDivLoss": (network(nn.LogSoftmax(1)), nn.KLDivLoss(reduction="sum"), lambda: targets().softmax(1)),
    "L1Loss": (network(), nn.L1Loss(), targets),
    "hinge": (network(), lambda z, y: (1 - z * y.sign()).clamp_min(0).mean(), targets),
}
CURVED: dict[str, tuple[nn.Module, Callable[..., Tensor], Callable[[], Tensor]]] = {
    "CrossEntropyLoss on log-probabilities": (network(nn.LogSoftmax(1)), nn.CrossEntropyLoss(), lambda: CLASSES),
    "HuberLoss, all residuals large": (network(), nn.HuberLoss(delta=1e-3), lambda: 5 + targets().abs()),
    "hinge, all satisfied": (network(), lambda z, y: (z - 50).clamp_min(0).mean(), targets),
    "squared hinge": (network(), lambda z, y: (1 - z * y).clamp_min(0).square().mean(), targets),
    "BCELoss": (network(nn.Sigmoid()), nn.BCELoss(), lambda: targets().sigmoid()),
    "SmoothL1Loss": (network(), nn.SmoothL1Loss(), targets),
}


@pytest.mark.parametrize("name", LINEAR)
def test_losses_without_curvature_are_refused(name: str) -> None:
    model, loss, labels = LINEAR[name]
    batch = torch.randn(N, 4, dtype=F64), labels()
    whole = curvature_blocks(model, loss, batch, "ggn").whole
    for use in (whole.dense, lambda: whole @ torch.ones(whole.size, dtype=F64)):
        with pytest.raises(InputError, match=r"is linear in the outputs.*'hessian'.*CrossEntropyLoss"):
            use()
    assert (
        relative(curvature_blocks(model, loss, batch, "hessian").whole.dense(), true_hessian(model, loss, batch))
        < 1e-11
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CURVED)
def test_losses_that_are_curved_somewhere_are_not(name: str) -> None:
    model, loss, labels = CURVED[name]
    batch = torch.randn(N, 4, dtype=F64), labels()
    found, truth = curvature_blocks(model, loss, batch, "ggn").whole.dense(), true_ggn(model, loss, batch)  # type: ignore[arg-type]
    assert float((found - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


# ----------------------------------------------------------------------------------------------------------------- scale

A = rotated(values([0.0] * 10, uniform(30, -1, 2)))
B = rotated(values([0.0] * 10, uniform(30, 0.5, 2)), 1)
ROWS = torch.randn(20, 40, generator=torch.Generator().manual_seed(2), dtype=F64)
Q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=F64)).Q

KINDS: dict[str, Callable[[float], SymmetricOperator]] = {
    "dense": lambda s: DenseOperator(A * s),
    "diagonal": lambda s: DiagonalOperator(A.diagonal() * s),
    "factored": lambda s: FactoredOperator(ROWS * s**0.5),
    "kronecker": lambda s: KroneckerOperator(B[:8, :8] * s, B[:5, :5]),
    "kronecker of extremes": lambda s: KroneckerOperator(B[:8, :8] * s, FactoredOperator(ROWS[:, :5] / s**0.25)),
    "eigenbasis": lambda s: EigenbasisOperator(Q, Q[:5, :5], (B[:8, :5].abs()) * s),
    "blocks": lambda s: BlockDiagonalOperator([DenseOperator(A * s), DiagonalOperator(A.diagonal() * s)]),
    "products": lambda s: MatrixFree(A * s),
}
DEGREE = {"kronecker of extremes": 0.5}  # A / s^(1/2) times B s
SCALES = [1e-200, 1e200]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_traces_and_summaries_at_the_ends_of_the_numbers(kind: str, scale: float) -> None:
    one, other = KINDS[kind](1.0), KINDS[kind](scale)
    unit = scale ** DEGREE.get(kind, 1.0)
    assert float(other.frobenius_norm()) / unit == pytest.approx(float(one.frobenius_norm()), rel=1e-10)
    methods = ("auto", "hutchinson", "hutch++")
    for method in methods:
        for estimate in (trace_estimate, frobenius_norm_estimate):
            a, b = estimate(one, method, probes=5), estimate(other, method, probes=5)
            assert b.value / unit == pytest.approx(a.value, rel=1e-9), estimate
            assert b.error / unit == pytest.approx(a.error, rel=1e-6, abs=1e-9), estimate
    first, second = spectral_summary(one), spectral_summary(other)
    for name in ("condition", "median_condition", "rank", "effective_rank", "stable_rank", "participation"):
        assert getattr(second, name).value == pytest.approx(getattr(first, name).value, rel=1e-9), name
    assert second.largest.value / unit == pytest.approx(first.largest.value, rel=1e-10)
    for method in ("auto", "stochastic"):
        assert relative_difference(other, other, method, probes=4) == (0, 0)
        cosine = fidelity(other, KINDS[kind](1.5 * scale), method, probes=4)
        again = fidelity(one, KINDS[kind](1.5), method, probes=4)
        for name in ("cosine", "relative_error", "best_scale"):
            assert getattr(cosine, name).value == pytest.approx(getattr(again, name).value, rel=1e-9), name


@pytest.mark.parametrize("scale", SCALES)
def test_lanczos_at_the_ends_of_the_numbers(scale: float) -> None:
    one, other = (spectral_summary(MatrixFree(A * s), "lanczos", probes=4, steps=40, deflate=2) for s in (1.0, scale))
    for name in ("rank", "condition", "median_condition", "stable_rank", "effective_rank", "negative_share"):
        for field in ("value", "error"):
            a, b = getattr(getattr(one, name), field), getattr(getattr(other, name), field)
            assert b == pytest.approx(a, rel=1e-6, abs=1e-5), (name, field)
    top = top_eigenvalues(MatrixFree(A * scale), 3)
    assert top.converged.all()
    torch.testing.assert_close(top.values / scale, top_eigenvalues(MatrixFree(A), 3).values, rtol=1e-10, atol=0)
    for s in (1.0, scale):
        density = spectral_density(MatrixFree(A * s), method="lanczos", probes=3, steps=20)
        assert density.cumulative(0.5 * s).value == pytest.approx(0.6, abs=0.2)
        assert density.cumulative(1e-9 * s).error < 0.5
        for axis in ("linear", "symlog"):
            curve = density.curve(axis)
            beside = 1 - density.zero_share.value
            assert float(torch.trapezoid(curve.density, curve.position)) == pytest.approx(beside, abs=2e-3)
    assert half_rank_condition(values([1.0, 2.0, 4.0]) * scale, 3) == 2


def test_blocks_of_very_different_size_have_a_cosine() -> None:
    """The angle does not depend on sizes, the difference is that of the larger one."""
    large, small = MatrixFree(B * 1e120), MatrixFree(B * 1e-120)
    assert fidelity(small, large).cosine.value == pytest.approx(1, rel=1e-12)
    assert fidelity(small, large).relative_error.value == pytest.approx(1, rel=1e-12)
    assert fidelity(small, large).best_scale.value == pytest.approx(1e240, rel=1e-12)
    assert (
        fidelity(large, small).relative_error.value == math.inf or fidelity(large, small).relative_error.value > 1e200
    )
    assert frobenius_norm_estimate(DenseOperator(torch.zeros(5, 5, dtype=F64))) == (0, 0)
    with pytest.raises(NonFiniteError):
        frobenius_norm_estimate(MatrixFree(torch.full((5, 5), math.nan, dtype=F64)))


def test_norms_in_float32() -> None:
    """Squares of 1e-30 are zero in float32, the norm is not."""
    matrix = (1e-30 * A).float()
    for operator in (DenseOperator(matrix), DiagonalOperator(matrix.diagonal()), MatrixFree(matrix)):
        want = float(operator.dense().double().norm())
        assert float(operator.frobenius_norm()) == pytest.approx(want, rel=1e-6)
