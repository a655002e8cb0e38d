"""Steps against dense linear algebra where K-FAC is the exact Gauss-Newton matrix, factors against curvlinops and BackPACK."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from backpack import backpack, extend, extensions
from curvlinops import FisherType, KFACLinearOperator
from curvlinops.kfac import KFACType
from dense_curvature import Loss, blocks, gauss_newton, gradient, optimiser, relative, step
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.kfac import Options
from secondorder.kfac.inverses import CorrectedEigenbasis
from secondorder.networks import network

EXACT = 1e-10
CE, MSE, BCE = F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits
LOSSES: dict[str, Loss] = {"cross_entropy": CE, "mse": MSE, "bce": BCE}


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@dataclass(frozen=True)
class Case:
    """Networks for which B kron A of every layer is its Gauss-Newton block."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    likelihood: str = "mse"
    sharing: str = "expand"


def linear(*widths: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b, bias) for a, b in pairwise(widths)))


def curved(activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation(), nn.Linear(5, 4, bias=False), activation(), nn.Linear(4, 3))


def one_position() -> nn.Sequential:
    """Convolutions with one output position each."""
    return nn.Sequential(nn.Conv2d(2, 4, (3, 2)), nn.Conv2d(4, 3, 1, bias=False), nn.Flatten(), nn.Linear(3, 2))


CASES = {
    "one layer": Case(lambda: linear(4, 3), (6, 4), (3,)),
    "deep linear": Case(lambda: linear(4, 5, 3, 2), (9, 4), (2,)),
    "deep linear without bias": Case(lambda: linear(4, 3, 2, bias=False), (9, 4), (2,)),
    "positions that are compared one by one": Case(lambda: linear(4, 5, 2), (6, 3, 4), (3, 2)),
    "positions that are averaged": Case(
        lambda: nn.Sequential(*linear(4, 5, 3), MeanOverPositions()), (6, 3, 4), (3,), sharing="reduce"
    ),
    "convolution of one position": Case(one_position, (5, 2, 3, 2), (2,)),
    "convolution of one position, reduce": Case(one_position, (5, 2, 3, 2), (2,), sharing="reduce"),
    "1d convolution of one position": Case(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 4), nn.Flatten(), nn.Linear(3, 2)), (5, 2, 4), (2,)
    ),
    "one sample, cross-entropy": Case(curved, (1, 4), (3,), "cross_entropy"),
    "one sample, squared error": Case(lambda: curved(nn.ReLU), (1, 4), (3,)),
    "one sample, bernoulli": Case(curved, (1, 4), (3,), "bce"),
    "one sample, convolution": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
        (1, 2, 3, 3), (3,), "cross_entropy",
    ),
}  # fmt: skip


def made(case: Case) -> tuple[nn.Module, Loss, Tensor, Tensor]:
    model, x = case.model().double(), torch.randn(case.shape, dtype=torch.float64)
    if case.likelihood == "cross_entropy":
        return model, CE, x, torch.randint(case.outputs[0], (len(x),))
    y = torch.randn(len(x), *case.outputs, dtype=torch.float64)
    return model, LOSSES[case.likelihood], x, y.sigmoid() if case.likelihood == "bce" else y


def newton(model: nn.Module, loss: Loss, x: Tensor, y: Tensor, damping: float, per_sample: float = 1.0) -> Tensor:
    """-(G_l + damping I)^-1 g_l of each layer, by dense linear algebra; G and g divided by `per_sample`."""
    G, g = gauss_newton(model, loss, x, y) / per_sample, gradient(model, loss, x, y) / per_sample
    steps = [
        torch.linalg.solve(G[b, b] + damping * torch.eye(b.stop - b.start).double(), g[b])
        for b in blocks(model).values()
    ]
    return -torch.cat(steps)


@pytest.mark.parametrize("approximation", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", CASES)
def test_step_is_that_of_the_dense_matrix(name: str, approximation: str) -> None:
    model, loss, x, y = made(CASES[name])
    case, damping = CASES[name], 0.03
    expected = newton(model, loss, x, y, damping)
    settings = {"approximation": approximation, "sharing": case.sharing, "ema_decay": 0.0}
    opt = optimiser(model, case.likelihood, damping=damping, lr=0.7, **settings)
    assert relative(step(opt, loss, x, y), 0.7 * expected) <= EXACT
    if approximation == "kfac":  # EKFAC's S is of the new batch in the old bases
        x, y = x.flip(-1) * 1.5 - 0.2, y.flip(0)
        expected = newton(model, loss, x, y, damping)
        assert relative(step(opt, loss, x, y), 0.7 * expected) <= EXACT


@pytest.mark.parametrize("name", ["deep linear", "one sample, cross-entropy", "one sample, bernoulli"])
def test_sum_of_losses_gives_the_step_of_their_mean(name: str) -> None:
    case = CASES[name]
    model, _, x, y = made(case)

    def loss(z: Tensor, targets: Tensor) -> Tensor:
        return LOSSES[case.likelihood](z, targets, reduction="sum")  # type: ignore[call-arg]

    opt = optimiser(model, case.likelihood, damping=0.03, reduction="sum")
    expected = newton(model, loss, x, y, 0.03, per_sample=len(x))
    assert relative(step(opt, loss, x, y), expected) <= EXACT


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_drawn_and_given_labels_of_one_sample(kind: str) -> None:
    """F is the outer product of one gradient: that of one of the three labels, or of the given one."""
    model, loss, x, y = made(CASES["one sample, cross-entropy"])
    g = gradient(model, loss, x, y)
    drawn = [gradient(model, loss, x, torch.tensor([k])) for k in range(3)] if kind == "mc" else [g]
    expected = []
    for d in drawn:
        terms = [
            torch.linalg.solve(torch.outer(d[b], d[b]) + 0.1 * torch.eye(len(d[b])).double(), g[b])
            for b in blocks(model).values()
        ]
        expected.append(-torch.cat(terms))
    got = step(optimiser(model, kind=kind), loss, x, y)
    assert min(relative(got, e) for e in expected) <= EXACT


def oracle(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor, kind: str, sharing: str) -> tuple[dict, dict]:
    """curvlinops' B and A of every layer; A with the ones of the bias."""
    operator = KFACLinearOperator(
        model, loss, list(model.parameters()), [(x, y)],
        fisher_type=FisherType.TYPE2 if kind == "exact" else FisherType.EMPIRICAL,
        kfac_approx=KFACType(sharing), check_deterministic=False, separate_weight_and_bias=False,
    )  # fmt: skip
    operator.compute_kronecker_factors()
    return operator._gradient_covariances, operator._input_covariances


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, (2, 3), padding=(0, 2), dilation=(1, 2), bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("likelihood", ["cross_entropy", "mse"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_after_one_step_are_those_of_curvlinops(sharing: str, likelihood: str, kind: str) -> None:
    model, x = convolutional(), torch.randn(4, 2, 6, 6, dtype=torch.float64)
    loss = nn.CrossEntropyLoss() if likelihood == "cross_entropy" else nn.MSELoss()
    y = torch.tensor([0, 2, 1, 1]) if likelihood == "cross_entropy" else torch.randn(4, 3, dtype=torch.float64)
    B, A = oracle(model, loss, x, y, kind, sharing)
    opt = optimiser(model, likelihood, kind, sharing=sharing)
    step(opt, loss, x, y)
    assert set(opt.preconditioner.statistics) == set(B) == {"0", "2", "5"}
    for name, held in opt.preconditioner.statistics.items():
        assert relative(held.A[0], A[name]) <= 1e-12
        # Empirical gradients of the mean over three elements: those of the sample's mean here, of one element there.
        terms = 3 if (likelihood, kind) == ("mse", "empirical") else 1
        assert relative(terms * held.B[0], B[name]) <= 1e-12


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("likelihood", ["cross_entropy", "mse"])
def test_factors_after_one_step_are_those_of_backpack(likelihood: str) -> None:
    model, x = curved(nn.Sigmoid).double(), torch.randn(6, 4, dtype=torch.float64)
    loss = nn.CrossEntropyLoss() if likelihood == "cross_entropy" else nn.MSELoss()
    y = torch.arange(6) % 3 if likelihood == "cross_entropy" else torch.randn(6, 3, dtype=torch.float64)
    twin = extend(curved(nn.Sigmoid).double())
    twin.load_state_dict(model.state_dict())
    with backpack(extensions.KFLR(), extensions.KFAC(mc_samples=20000)):
        extend(type(loss)())(twin(x), y).backward()
    exact, drawn = optimiser(model, likelihood, lr=0.0), optimiser(model, likelihood, "mc", lr=0.0, samples=400)
    step(exact, loss, x, y)
    step(drawn, loss, x, y)
    for name, held in exact.preconditioner.statistics.items():
        B, A = twin.get_submodule(name).weight.kflr
        without_ones = slice(0, len(A))
        assert relative(held.A[0, without_ones, without_ones], A) <= 1e-12
        assert relative(held.B[0], B) <= 1e-12
        sampled = twin.get_submodule(name).weight.kfac[0]
        assert relative(drawn.preconditioner.statistics[name].B[0], sampled) < 0.1  # 2,400 draws: 2 % each
        assert relative(sampled, B) < 0.05


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_moments_of_ekfac_are_the_diagonal_of_the_exact_matrix(sharing: str) -> None:
    """After a second step at the same weights, S is diag(Q^T G Q) of every layer, and so is the step."""
    model, x, y = convolutional(), torch.randn(4, 2, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    G, g = gauss_newton(model, CE, x, y), gradient(model, CE, x, y)
    one_basis = Options(warm_up=False, stagger=False)
    opt = optimiser(model, approximation="ekfac", sharing=sharing, lr=0.0, inverse_interval=100, options=one_basis)
    step(opt, CE, x, y)
    opt.param_groups[0]["lr"] = 1.0
    change = step(opt, CE, x, y)
    for name, block in blocks(model).items():
        inverse, layer = opt.preconditioner.blocks.inverses[name], opt.preconditioner.layers[name]
        assert isinstance(inverse, CorrectedEigenbasis)
        order = with_bias_last(layer.outputs, layer.inputs, layer.bias is not None)
        Q = torch.kron(inverse.Q_B[0], inverse.Q_A[0])
        S = (Q.mT @ G[block, block][order][:, order] @ Q).diagonal()
        assert relative(inverse.S.flatten(), S) <= EXACT
        expected = -Q @ ((Q.mT @ g[block][order]) / (S + 0.1))
        assert relative(change[block][order], expected) <= EXACT


def with_bias_last(outputs: int, inputs: int, bias: bool) -> Tensor:
    """Indices that turn (weight, bias) into the rows of [weight | bias]."""
    if not bias:
        return torch.arange(outputs * inputs)
    weight = torch.arange(outputs * (inputs - 1)).view(outputs, -1)
    return torch.cat([weight, outputs * (inputs - 1) + torch.arange(outputs)[:, None]], 1).flatten()


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("relative_damping", [True, False])
def test_wide_classifier_of_a_covariance_head_equals_the_dense_computation(
    inverse: str, relative_damping: bool
) -> None:
    """Rows and their Gram matrix instead of A: 37 inputs, six samples; also after the rows have been replaced."""
    changes = {}
    for wide_inputs in (30, 4096):
        torch.manual_seed(1)
        model = network("digits_net", "gcp", 10, in_channels=1, reduced_channels=8).double().eval()
        damping = 0.1 if relative_damping else 1e-3
        opt = optimiser(
            model, damping=damping, relative=relative_damping, inverse=inverse, ema_decay=0.0, lr=0.01,
            options=Options(wide_inputs=wide_inputs),
        )  # fmt: skip
        batches = [(torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(10, (6,))) for _ in range(2)]
        changes[wide_inputs] = torch.stack([step(opt, CE, *batch) for batch in batches])
        held = opt.preconditioner.statistics["classifier"]
        assert (held.A is None) == (wide_inputs == 30)
        assert (held.rows is None) == (wide_inputs == 4096)
    assert relative(changes[30], changes[4096]) <= EXACT
    assert float(changes[30].norm()) > 0
