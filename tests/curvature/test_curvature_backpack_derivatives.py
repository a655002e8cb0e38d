"""Jacobians, residuals and factors of single modules against explicit matrices by torch.func, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

from secondorder.curvature.backpack.branches import ChannelShuffle, ChannelSlice
from secondorder.curvature.backpack.derivatives.base import Derivatives
from secondorder.curvature.backpack.derivatives.batch_norm import BatchNormDerivatives
from secondorder.curvature.backpack.registration import DERIVATIVES
from secondorder.errors import InputError
from secondorder.matrix_power import newton_schulz_sqrt
from secondorder.matrix_power.transforms import symmetric
from secondorder.pooling import Covariance, MatrixLogarithm, MatrixPower, MatrixSquareRoot, RandomLift, UpperTriangle

N, COLUMNS = 3, 2


def features(*shape: int) -> Tensor:
    return torch.randn(N, *shape, dtype=torch.float64)


def covariances(size: int = 4) -> Tensor:
    x = features(size, 9)
    return x @ x.mT / 9


class Attention(nn.Module):
    """A pooling that a user might write: positions weighted by their mean over channels, [N, C, H, W] -> [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        return (x * x.mean(1, keepdim=True).softmax(-1)).sum(-1)


@dataclass
class Case:
    module: nn.Module
    x: Callable[[], Tensor]
    reference: Callable[[Tensor], Tensor] | None = None  # an independent definition of the same function

    @property
    def derivatives(self) -> Derivatives:
        return DERIVATIVES.get(type(self.module), Derivatives())

    @property
    def of_matrices(self) -> bool:
        return isinstance(self.module, MatrixSquareRoot | MatrixPower | MatrixLogarithm)


def by_lyapunov(S: Tensor) -> Tensor:
    """The exact root by twelve steps of Denman-Beavers in plain autograd."""
    Y, Z = S, torch.eye(S.shape[-1], dtype=S.dtype)
    for _ in range(12):
        Y, Z = (Y + torch.linalg.inv(Z)) / 2, (Z + torch.linalg.inv(Y)) / 2
    return Y


LIFTS = {channels: RandomLift(channels) for channels in (2, 4)}


def by_directions(z: Tensor) -> Tensor:
    """A random lift in a loop over its directions."""
    C = z.shape[1]
    a, scale = LIFTS[C].rotation.to(z.dtype), (4 * torch.pi * (torch.pi - 2) / C) ** 0.5
    products = [scale * (z @ a[i]) * (z @ a[j]) for i in range(C) for j in range(i + 1, C)]
    return torch.cat([z, torch.stack(products, 1)], 1)


CASES = {
    "covariance": Case(Covariance(), lambda: features(3, 2, 3)),
    "covariance of sequences": Case(Covariance("NCL"), lambda: features(3, 5)),
    "covariance of tokens": Case(Covariance("NLC"), lambda: features(5, 3)),
    "covariance of channels-last maps": Case(Covariance("NHWC"), lambda: features(2, 3, 3)),
    "upper triangle": Case(UpperTriangle(), lambda: covariances(3)),
    "random lift": Case(LIFTS[4], lambda: features(4), by_directions),
    "random lift of a pair": Case(LIFTS[2], lambda: features(2), by_directions),
    "newton_schulz": Case(MatrixSquareRoot("newton_schulz", 5), covariances, newton_schulz_sqrt),
    "auto": Case(MatrixSquareRoot("auto", 8), covariances, lambda S: newton_schulz_sqrt(S, 8)),
    "exact root": Case(MatrixSquareRoot("eigh"), covariances, by_lyapunov),
    "power 0.3": Case(MatrixPower(0.3), covariances),
    "power 0.5": Case(MatrixPower(0.5), covariances, by_lyapunov),
    "power 1": Case(MatrixPower(1), covariances, torch.clone),
    "power 2": Case(MatrixPower(2), covariances, lambda S: S @ S),
    "power -1": Case(MatrixPower(-1.0), covariances, torch.linalg.inv),
    "logarithm": Case(MatrixLogarithm(1e-3), covariances),
    "adaptive average": Case(nn.AdaptiveAvgPool2d(2), lambda: features(2, 5, 3)),
    "average": Case(nn.AvgPool2d(3, 2, padding=1), lambda: features(2, 5, 5)),
    "batch norm": Case(nn.BatchNorm2d(3).double().eval(), lambda: features(3, 2, 2)),
    "batch norm, no weight": Case(nn.BatchNorm2d(3, affine=False).double().eval(), lambda: features(3, 2, 2)),
    "relu6": Case(nn.ReLU6(), lambda: 6 * features(3, 2, 2)),
    "leaky": Case(nn.LeakyReLU(0.1), lambda: features(3, 2)),
    "silu": Case(nn.SiLU(), lambda: features(3, 2)),
    "gelu": Case(nn.GELU(), lambda: features(3, 2)),
    "elu": Case(nn.ELU(), lambda: features(3, 2)),
    "softplus": Case(nn.Softplus(), lambda: features(3, 2)),
    "hardswish": Case(nn.Hardswish(), lambda: features(3, 2)),
    "tanh": Case(nn.Tanh(), lambda: features(3, 2)),
    "sigmoid": Case(nn.Sigmoid(), lambda: features(3, 2)),
    "identity": Case(nn.Identity(), lambda: features(3, 2)),
    "slice": Case(ChannelSlice(1, 3), lambda: features(4, 2)),
    "shuffle": Case(ChannelShuffle(2), lambda: features(4, 2)),
    "user": Case(Attention(), lambda: features(3, 2, 2)),
}


@dataclass
class Explicit:
    """A module at a point with its Jacobian J [N, Do, Di] and residual R [N, Di, Di] for the gradient g [N, *out]."""

    case: Case
    x: Tensor
    g: Tensor
    J: Tensor
    R: Tensor


def sample_function(case: Case) -> Callable[[Tensor], Tensor]:
    """One sample's input as a vector -> its output as a vector, of the symmetric part for functions of matrices."""
    shape = case.x().shape[1:]
    function = case.reference or case.module.forward

    def vector(x: Tensor) -> Tensor:
        x = x.view(shape)
        return function((symmetric(x) if case.of_matrices else x)[None])[0].flatten()

    return vector


@pytest.fixture(params=CASES, scope="module")
def explicit(request: pytest.FixtureRequest) -> Explicit:
    torch.manual_seed(0)
    case = CASES[request.param]
    if isinstance(case.module, nn.BatchNorm2d):
        case.module.running_mean.normal_(0, 0.3)
        case.module.running_var.uniform_(0.5, 2)
        if case.module.affine:
            nn.init.normal_(case.module.weight)
    x = case.x()
    y = case.module(x).detach()
    case.module.input0, case.module.output = x, y  # what BackPACK's hooks store
    g = torch.randn_like(y)
    f = sample_function(case)
    J = vmap(jacrev(f))(x.flatten(1)).detach()
    R = torch.stack([hessian(lambda x, n=n: f(x) @ g[n].flatten())(x[n].flatten()) for n in range(N)]).detach()
    return Explicit(case, x, g, J, R)


def columns(explicit: Explicit) -> Tensor:
    """Random columns at the input [V, N, *in]; symmetric where only symmetric matrices come in."""
    V = torch.randn(COLUMNS, *explicit.x.shape, dtype=torch.float64)
    return symmetric(V) if explicit.case.of_matrices else V


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    """Relative to the larger of the two, and equal when both vanish."""
    return float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), 1e-3)


def applied(matrix: Tensor, V: Tensor, shape: tuple) -> Tensor:
    """A matrix of each sample [N, a, b] times columns [V, N, *]."""
    return (matrix @ V.flatten(2).movedim(0, -1)).movedim(-1, 0).view(len(V), *shape)


def test_jacobian_and_its_transpose(explicit: Explicit):
    d, module, x = explicit.case.derivatives, explicit.case.module, explicit.x
    V, G = columns(explicit), torch.randn(COLUMNS, *explicit.g.shape, dtype=torch.float64)
    assert close(d.jacobian(module, V), applied(explicit.J, V, explicit.g.shape))
    expected = applied(explicit.J.mT, G, x.shape)
    assert close(d.transposed(module, G), expected)
    assert close(d.transposed(module, G[:, [2, 0]], [2, 0]), expected[:, [2, 0]])


def test_residual(explicit: Explicit):
    d, module, V = explicit.case.derivatives, explicit.case.module, columns(explicit)
    assert close(d.residual(module, explicit.g, V), applied(explicit.R, V, explicit.x.shape))
    assert d.hessian_is_zero(module) == bool((explicit.R.abs() < 1e-12).all())


def test_signed_factors_are_the_residual(explicit: Explicit):
    d, module = explicit.case.derivatives, explicit.case.module
    total = torch.zeros_like(explicit.R)
    for F, sign in d.signed_factors(module, explicit.g):
        F = F.flatten(2)
        total += sign * torch.einsum("vni,vnj->nij", F, F)
    assert close(total, explicit.R)


def test_random_columns_are_orthonormal_on_average(explicit: Explicit):
    """E[R z z^T] = R for every residual exactly if E[z z^T] is the identity where R acts: the projection of the basis."""
    d, x = explicit.case.derivatives, explicit.x
    draws = 4000
    E, z = d.basis(x).flatten(1), d.draw(x, draws).flatten(2)
    projection = E.mT @ E
    products = torch.einsum("vi,vj->vij", z[:, 0], z[:, 0])
    error = (products.mean(0) - projection).abs()
    assert (error <= 5 * products.std(0) / draws**0.5 + 1e-12).all()
    assert torch.allclose(z @ projection, z)


def test_draws_estimate_the_residual_without_bias(explicit: Explicit):
    d, module = explicit.case.derivatives, explicit.case.module
    estimates = []
    for _ in range(12):
        total = torch.zeros_like(explicit.R)
        for F, sign in d.signed_draws(module, explicit.g, 13):
            total += sign * torch.einsum("vni,vnj->nij", F.flatten(2), F.flatten(2))
        estimates.append((total * explicit.R).sum())
    estimates = torch.stack(estimates)
    truth = explicit.R.square().sum()
    assert (estimates.mean() - truth).abs() <= 4 * estimates.std() / len(estimates) ** 0.5 + 1e-12 * (1 + truth)


def test_average_over_samples(explicit: Explicit):
    d, module, J = explicit.case.derivatives, explicit.case.module, explicit.J
    B = torch.randn(J.shape[1], J.shape[1], dtype=torch.float64)
    B = B + B.mT
    assert close(d.averaged(module, B), (J.mT @ B @ J).mean(0))


def test_every_module_of_the_table_is_tested():
    assert set(DERIVATIVES) <= {type(case.module) for case in CASES.values()}


def test_zero_covariance_has_finite_derivatives():
    for module in (MatrixSquareRoot(), MatrixSquareRoot("eigh"), MatrixPower(0.3), MatrixLogarithm()):
        module.input0 = torch.zeros(1, 3, 3, dtype=torch.float64)
        d, V = DERIVATIVES[type(module)], torch.randn(2, 1, 3, 3, dtype=torch.float64)
        assert d.jacobian(module, V).isfinite().all()
        assert d.transposed(module, V).isfinite().all()


def test_batch_norm_needs_evaluation_mode():
    module = nn.BatchNorm2d(3)
    module.input0 = torch.randn(N, 3, 2, 2)
    with pytest.raises(InputError, match=r"\.eval\(\)"):
        BatchNormDerivatives().jacobian(module, torch.randn(1, N, 3, 2, 2))
