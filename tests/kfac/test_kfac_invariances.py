"""What must not matter to a step: the scale of the loss, copies of the batch, the order of samples, the basis of the inputs."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import pytest
import torch
from dense_curvature import gradient, optimiser, relative, step, weights
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.kfac import Options

EXACT = 1e-10


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(16, 3),
    ).double()  # fmt: skip


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 2, 6, 6, dtype=torch.float64), torch.arange(n) % 3


def changes(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], loss: Callable = F.cross_entropy, **options
) -> Tensor:
    """Of the weights in several steps of a copy of the model."""
    opt = optimiser(deepcopy(model), **options)
    return torch.stack([step(opt, loss, *data) for data in batches])


@pytest.mark.parametrize("inverse", ["eigen", "cholesky", "ekfac"])
@pytest.mark.parametrize("scale", [1e-3, 70.0])
def test_scale_of_the_loss_with_empirical_fisher(scale: float, inverse: str) -> None:
    """c L has the gradient c g and the matrix c^2 F: with damping c^2 lambda the step is 1 / c of the old one."""
    model, data = convolutional(), [batch()]
    options: dict = (
        {"kind": "empirical", "approximation": "ekfac"}
        if inverse == "ekfac"
        else {"kind": "empirical", "inverse": inverse}
    )

    def scaled(z: Tensor, y: Tensor) -> Tensor:
        return scale * F.cross_entropy(z, y)

    for relative_damping, other in ((False, 0.01 * scale**2), (True, 0.01)):
        settings = options | {"relative": relative_damping}
        plain, got = (
            changes(model, data, damping=0.01, **settings),
            changes(model, data, scaled, damping=other, **settings),
        )
        assert relative(got * scale, plain) <= EXACT
    wrong = changes(model, data, scaled, damping=0.01, **options)
    assert relative(wrong * scale, plain) > 0.1


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_relative_damping_ignores_the_scale_of_inputs_and_gradients(inverse: str) -> None:
    """x -> c x before a first layer W / c without bias: W's step in units of W is the same."""
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    rescaled = deepcopy(model)
    with torch.no_grad():
        rescaled[0].weight.div_(100)
    options = {"relative": True, "damping": 0.3, "inverse": inverse}
    plain, got = changes(model, [(x, y)], **options)[0], changes(rescaled, [(100 * x, y)], **options)[0]
    weights = model[0].weight.numel()
    assert relative(100 * got[:weights], plain[:weights]) <= EXACT
    assert relative(got[weights:], plain[weights:]) <= EXACT


@pytest.mark.parametrize(
    ("kind", "sharing", "approximation", "relative_damping"),
    [  # every two of these, in half of the cases
        ("exact", "expand", "kfac", True),
        ("exact", "reduce", "ekfac", True),
        ("empirical", "expand", "ekfac", True),
        ("empirical", "reduce", "kfac", True),
        ("exact", "expand", "ekfac", False),
        ("exact", "reduce", "kfac", False),
        ("empirical", "expand", "kfac", False),
        ("empirical", "reduce", "ekfac", False),
    ],
)
def test_copies_and_order_of_samples(relative_damping: bool, approximation: str, sharing: str, kind: str) -> None:
    model, data = convolutional(), [batch(24), batch(24)]  # A of full rank: EKFAC's basis is unique
    options = {
        "kind": kind,
        "sharing": sharing,
        "approximation": approximation,
        "relative": relative_damping,
        "lr": 0.1,
    }
    plain = changes(model, data, **options)
    doubled = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in data]
    order = torch.randperm(24)
    permuted = [(x[order], y[order]) for x, y in data]
    assert relative(changes(model, doubled, **options), plain) <= EXACT
    assert relative(changes(model, permuted, **options), plain) <= EXACT
    assert relative(changes(model, [(x.flip(0), y) for x, y in data], **options), plain) > 1e-3


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_affine_reparametrisation_of_the_inputs(inverse: str, kind: str) -> None:
    """x -> S x + v with the first layer compensating: without damping, the function after the step is the same."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(60, 4, dtype=torch.float64) @ torch.randn(4, 4).double() + 3, torch.randn(60, 3).double()
    S = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)))  # whitening
    v = -S @ x.mean(0)
    other = deepcopy(model)
    with torch.no_grad():
        other[0].weight.copy_(model[0].weight @ torch.linalg.inv(S))
        other[0].bias.sub_(other[0].weight @ v)
    moved = x @ S.T + v
    assert relative(other(moved), model(x)) < 1e-12
    before = model(x).detach()
    least = 1e-12 if inverse == "eigen" else 1e-20  # its square root is added to A
    for damping, same in ((least, True), (1.0, False)):
        pair = deepcopy(model), deepcopy(other)
        for network, inputs in zip(pair, (x, moved), strict=True):
            opt = optimiser(network, "mse", kind, damping, relative=True, lr=0.1, inverse=inverse)
            step(opt, F.mse_loss, inputs, y)
        change = pair[0](x).detach() - before
        assert float(change.norm() / before.norm()) > 1e-3
        difference = relative(pair[1](moved) - before, change)
        assert difference < 1e-5 if same else difference > 1e-2


def several_steps(reduction: str, **settings: object) -> Tensor:
    torch.manual_seed(0)
    model, (x, y) = convolutional(), batch(24)
    opt = optimiser(model, reduction=reduction, relative=True, lr=0.2, momentum=0.8, **settings)
    return torch.stack([step(opt, partial(F.cross_entropy, reduction=reduction), x, y) for _ in range(4)])


@pytest.mark.parametrize(("kind", "decoupled"), [("exact", True), ("mc", True), ("empirical", True), ("exact", False)])
def test_mean_and_sum_of_losses_train_alike(decoupled: bool, kind: str) -> None:
    for settings in ({"weight_decay": 0.1}, {"clip": 1e-3}, {"approximation": "ekfac"}):
        given = {"kind": kind, "options": Options(decoupled=decoupled)} | settings
        plain = several_steps("mean", **given)
        assert relative(several_steps("sum", **given), plain) <= 1e-8
    assert relative(several_steps("sum", **(given | {"weight_decay": 0.2})), plain) > 1e-3


PLACES = ("before the forward pass", "after it", "before the backward pass", "after the step")


def trained(kind: str, place: str, skipped: bool) -> Tensor:
    """Weights after a loop that clears its gradients at this place; skipped: a first round, of other inputs, without a step."""
    torch.manual_seed(0)
    model, (x, y) = convolutional(), batch()
    opt = optimiser(model, kind=kind, lr=0.2)

    def turn(inputs: Tensor, stepping: bool = True) -> None:
        for here in PLACES:
            if here == "after it":
                z = model(inputs)
            elif here == "before the backward pass":
                opt.update_curvature(z)
            elif here == "after the step":
                F.cross_entropy(z, y).backward()
                if stepping:
                    opt.step()
            if here == place:
                opt.zero_grad()

    draws = opt.preconditioner.gathering.generator.get_state()
    if skipped:
        turn(5 * x, stepping=False)
        opt.preconditioner.gathering.generator.set_state(draws)
    for _ in range(3):
        turn(x)
    return weights(model)


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_place_of_zero_grad_and_skipped_steps(kind: str) -> None:
    plain = trained(kind, PLACES[0], skipped=False)
    for place in PLACES:
        assert torch.equal(trained(kind, place, skipped=False), plain), place
        if (
            kind == "empirical" or place != "before the backward pass"
        ):  # there, drawn gradients of both batches have come
            assert torch.equal(trained(kind, place, skipped=True), plain), place


def test_gradient_descent_does_depend_on_the_basis_of_the_inputs() -> None:
    """The test above can fail: plain gradients move the function differently."""
    model, x = nn.Linear(4, 3).double(), torch.randn(8, 4, dtype=torch.float64)
    scaled = deepcopy(model)
    with torch.no_grad():
        scaled.weight.div_(10)
    y = torch.randn(8, 3, dtype=torch.float64)
    g, h = gradient(model, F.mse_loss, x, y)[:12], gradient(scaled, F.mse_loss, 10 * x, y)[:12]
    assert relative(10 * h, g) > 1
