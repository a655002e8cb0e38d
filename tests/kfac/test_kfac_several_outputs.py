"""A likelihood and a weight for each output of a model, against dense float64 linear algebra."""

from collections.abc import Callable

import pytest
import torch
from dense_curvature import blocks, gauss_newton, gradient, relative, weights
from kfac_training import same, snapshot
from torch import Tensor, nn
from torch.func import hessian, jacrev
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.gauss_newton import GaussNewton
from secondorder.kfac import KFAC, Damping, Fisher, KFACPreconditioner, Options
from secondorder.preconditioning import kfac_direction

POLICY_AND_VALUE = ["cross_entropy", "mse"]
LOSSES = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}


class TwoHeads(nn.Module):
    """A body, 3 logits and one value."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.activation = activation
        self.body, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1, bias=False)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.activation(self.body(x))
        return self.policy(hidden), self.value(hidden)


class Joined(nn.Module):
    """The same network with its outputs side by side, for the dense matrix."""

    def __init__(self, model: TwoHeads) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.model(x), 1)


def targets(likelihoods: list[str], N: int) -> list[Tensor]:
    shapes = (N, 3), (N, 1)
    return [
        torch.arange(N) % 3 if name == "cross_entropy" else torch.rand(shape).double()
        for name, shape in zip(likelihoods, shapes, strict=True)
    ]


def total(likelihoods: list[str], y: list[Tensor], factors: tuple[float, ...] = (1.0, 1.0)) -> Callable[..., Tensor]:
    def loss(z: Tensor | tuple[Tensor, Tensor], _: object = None) -> Tensor:
        heads = z.split([3, 1], 1) if isinstance(z, Tensor) else z
        terms = zip(factors, likelihoods, heads, y, strict=True)
        return torch.stack([factor * LOSSES[name](head, target) for factor, name, head, target in terms]).sum()

    return loss


def taken(optimizer: KFAC, loss: Callable[..., Tensor], x: Tensor) -> Tensor:
    """One step; the change of the weights."""
    before = weights(optimizer.model)
    optimizer.zero_grad()
    z = optimizer.model(x)
    optimizer.update_curvature(z)
    loss(z).backward()
    optimizer.step()
    return weights(optimizer.model) - before


@pytest.mark.parametrize("approximation", ["kfac", "ekfac"])
@pytest.mark.parametrize(
    ("likelihoods", "N", "activation"),
    [(["mse", "mse"], 7, lambda h: h), (POLICY_AND_VALUE, 1, torch.tanh), (["bce", "mse"], 1, torch.tanh)],
)
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.3, 2.0)])
def test_the_step_is_that_of_the_dense_matrix(
    likelihoods: list[str],
    N: int,
    activation: Callable[[Tensor], Tensor],
    factors: tuple[float, float],
    approximation: str,
) -> None:
    model, x = TwoHeads(activation), torch.randn(N, 4).double()
    loss = total(likelihoods, targets(likelihoods, N), factors)
    G, g = gauss_newton(Joined(model), loss, x, x), gradient(Joined(model), loss, x, x)
    expected = [
        torch.linalg.solve(G[b, b] + 0.1 * torch.eye(b.stop - b.start).double(), g[b])
        for b in blocks(Joined(model)).values()
    ]
    optimizer = KFAC(
        model, 1.0, step_rule="natural", momentum=0.0, clip=None, damping=Damping(0.1, relative=False),
        approximation=approximation, fisher=Fisher("exact", likelihoods, weights=factors),
    )  # fmt: skip
    assert relative(taken(optimizer, loss, x), -torch.cat(expected)) <= 1e-10


@pytest.mark.parametrize(
    ("kind", "likelihoods", "tolerance"),
    [
        ("exact", POLICY_AND_VALUE, 1e-12),
        ("exact", ["bce", "mse"], 1e-12),
        ("exact", ["cross_entropy", "bce"], 1e-12),
        ("mc", POLICY_AND_VALUE, 0.15),  # 2,400 draws
    ],
)
def test_the_factor_of_the_body_has_the_curvature_of_both_losses(
    likelihoods: list[str], kind: str, tolerance: float
) -> None:
    """B = mean_n J_n^T H_n J_n with J_n the Jacobian of all outputs with respect to the body's."""
    model, x, y = TwoHeads(), torch.randn(6, 4).double(), targets(likelihoods, 6)
    loss = total(likelihoods, y, (1.0, 0.5))
    samples = 1 if kind == "exact" else 400
    optimizer = KFAC(model, fisher=Fisher(kind, likelihoods, samples=samples, weights=[1, 0.5]), ema_decay=0.0)
    before = model.body(x).detach()

    def outputs(s: Tensor) -> Tensor:
        hidden = s.tanh()
        return torch.cat([model.policy(hidden), model.value(hidden)])

    expected = torch.zeros(5, 5).double()
    for n, s in enumerate(before):
        own = total(likelihoods, [target[n : n + 1] for target in y], (1.0, 0.5))
        J, H = jacrev(outputs)(s), hessian(lambda z, own=own: own(z[None]))(outputs(s))
        expected += J.mT @ H @ J / 6
    taken(optimizer, loss, x)
    B = optimizer.preconditioner.statistics["body"].B
    assert B is not None
    assert relative(B[0], expected) <= tolerance


def test_another_number_of_outputs() -> None:
    model, x = TwoHeads(), torch.randn(6, 4).double()
    optimizer = KFAC(model, fisher=Fisher(likelihood=POLICY_AND_VALUE))
    policy, value = model(x)
    for outputs, count in ((policy, 1), ([policy, value, value], 3)):
        with pytest.raises(
            InputError, match=rf"likelihood \['cross_entropy', 'mse'\] is for 2 outputs, and there are {count}"
        ):
            optimizer.update_curvature(outputs)
    optimizer.update_curvature([policy, value])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"likelihood": []}, r"likelihood \[\]: must have an entry for each output"),
        ({"likelihood": ["mse", "poisson"]}, "unknown likelihood 'poisson'"),
        ({"likelihood": ["mse"], "weights": [1, 2]}, r"weights \[1, 2\] is for 2 outputs, and there are 1"),
        ({"weights": [1, 0]}, "weights 0: must be above 0"),
        ({"weights": "1"}, "weights '1': must be a number"),
    ],
)
def test_lists_that_do_not_fit(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Fisher(**settings)  # type: ignore[arg-type]


def test_each_output_is_checked() -> None:
    x, y = torch.randn(16, 4).double(), targets(POLICY_AND_VALUE, 16)
    loss = total(POLICY_AND_VALUE, y)
    taken(KFAC(TwoHeads(), fisher=Fisher(likelihood=POLICY_AND_VALUE)), loss, x)
    with pytest.raises(InputError, match=r"logits of shape \[16, 1\].* or a list with one for each"):
        taken(KFAC(TwoHeads()), loss, x)
    with pytest.raises(InputError, match="is that of likelihood 'cross_entropy', and likelihood='mse'"):
        taken(KFAC(TwoHeads(), fisher=Fisher(likelihood=["mse", "mse"])), loss, x)
    with pytest.raises(InputError, match="does not sum to zero over dim 1"):
        taken(
            KFAC(TwoHeads(), fisher=Fisher(likelihood=POLICY_AND_VALUE)),
            total(["bce", "mse"], targets(["bce", "mse"], 16)),
            x,
        )


def test_factors_of_the_losses_are_checked() -> None:
    x, both = torch.randn(16, 4).double(), ["cross_entropy", "bce"]
    y = [torch.arange(16) % 3, (torch.arange(16).view(16, 1) % 2).double()]
    with pytest.raises(InputError, match=r"have factors from 0.4 to 1: pass them as Fisher\(weights=\[...\]\)"):
        taken(KFAC(TwoHeads(), fisher=Fisher(likelihood=both)), total(both, y, (1.0, 0.4)), x)
    with pytest.warns(UserWarning, match="is 0.4 times"):
        taken(KFAC(TwoHeads(), fisher=Fisher(likelihood=both)), total(both, y, (0.4, 0.4)), x)
    taken(KFAC(TwoHeads(), fisher=Fisher(likelihood=both, weights=(1, 0.4))), total(both, y, (1.0, 0.4)), x)


@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
def test_a_resumed_training_takes_the_same_steps(kind: str) -> None:
    x, loss = torch.randn(6, 4).double(), total(POLICY_AND_VALUE, targets(POLICY_AND_VALUE, 6))

    def made() -> KFAC:
        return KFAC(TwoHeads(), fisher=Fisher(kind, POLICY_AND_VALUE), factor_interval=2)

    first, second = made(), made()
    for _ in range(3):
        taken(first, loss, x)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(snapshot(first.state_dict()))
    for _ in range(3):
        assert same(taken(first, loss, x), taken(second, loss, x))


def test_the_preconditioner_takes_them_and_others_refuse() -> None:
    model, x = TwoHeads(), torch.randn(6, 4).double()
    loss = total(POLICY_AND_VALUE, targets(POLICY_AND_VALUE, 6))
    fisher = Fisher(likelihood=POLICY_AND_VALUE)
    preconditioner = KFACPreconditioner(model, fisher=fisher)
    z = model(x)
    preconditioner.update_curvature(z)
    loss(z).backward()
    assert preconditioner.step()
    with pytest.raises(InputError, match="quadratic_step: the model returned a tuple; it must return one tensor"):
        KFAC(model, fisher=fisher, options=Options(check=False)).quadratic_step(loss, x, x)
    with pytest.raises(InputError, match="the network returns a tuple; K-FAC's direction needs one tensor of logits"):
        kfac_direction(model, (x, x), 0.1, gradient={name: torch.ones_like(p) for name, p in model.named_parameters()})
    with pytest.raises(InputError, match=r"loss list: K-FAC's direction needs"):
        kfac_direction(model, (x, x), 0.1, loss=POLICY_AND_VALUE)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"unknown likelihood \['cross_entropy', 'mse'\]"):
        GaussNewton(model, 0.1, likelihood=POLICY_AND_VALUE)  # type: ignore[arg-type]
