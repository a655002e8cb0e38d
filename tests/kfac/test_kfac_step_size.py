"""Learning rate and momentum from the quadratic model, and damping from how well the model predicts."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import pytest
import torch
from dense_curvature import Loss, gauss_newton, gradient, relative, weights
from natural import KFAC
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.kfac import Damping, Fisher, LevenbergMarquardt, Options, step_size

CE, MSE = F.cross_entropy, F.mse_loss
Change = tuple[float, float]


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def made(model: nn.Module, likelihood: str = "mse", damping: float = 1e-10, **options: object) -> KFAC:
    """K-FAC with absolute damping and the exact Fisher matrix, everything renewed at each step."""
    value = Damping(damping, relative=bool(options.pop("relative", False)), adapt=options.pop("adapt", None))  # type: ignore[arg-type]
    fisher = Fisher(str(options.pop("kind", "exact")), likelihood, str(options.pop("reduction", "mean")))
    settings = {"lr": 0.1, "factor_interval": 1, "inverse_interval": 1} | options
    return KFAC(model, damping=value, fisher=fisher, **({"clip": None} | settings))  # type: ignore[arg-type]


def regression(n: int = 12) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64)


def noisy() -> nn.Sequential:
    """Batch statistics, random masks, and parameters without factors."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 5, bias=False), nn.Tanh(),
        nn.Linear(5, 3),
    ).double()  # fmt: skip


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Change]]:
    """The pairs (actual, predicted) by which the damping is adapted."""
    pairs: list[Change] = []
    adapt = step_size.adapt_damping

    def note(optimizer: KFAC, actual: float, predicted: float) -> None:
        pairs.append((actual, predicted))
        adapt(optimizer, actual, predicted)

    monkeypatch.setattr(step_size, "adapt_damping", note)
    return pairs


@pytest.mark.parametrize("relative_damping", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_undamped_step_solves_linear_least_squares(reduction: str, relative_damping: bool) -> None:
    model, (x, y) = nn.Linear(4, 3).double(), regression()

    def loss(z: Tensor, targets: Tensor) -> Tensor:
        return MSE(z, targets, reduction=reduction)

    returned = made(model, reduction=reduction, relative=relative_damping).quadratic_step(loss, x, y)
    assert not returned.requires_grad
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(12, 1).double()], 1), y).solution
    assert float((model.weight.detach() - solution[:-1].T).abs().max()) < 1e-8
    assert float((model.bias.detach() - solution[-1]).abs().max()) < 1e-8
    assert float(loss(model(x), y).detach()) < float(returned)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_predicted_change_of_a_quadratic_is_the_actual_one(decay: float, judged: list[Change]) -> None:
    """Also with a learning rate of step(closure), whose model is K-FAC's own: exact for one layer."""
    model, (x, y) = nn.Linear(4, 3).double(), regression()
    opt = made(model, weight_decay=decay, adapt=LevenbergMarquardt(every=1))
    for _ in range(3):
        opt.quadratic_step(MSE, x, y)
    assert judged[0][1] < -0.01
    for actual, predicted in judged if decay else judged[:1]:  # without decay the first step has arrived
        assert actual == pytest.approx(predicted, rel=1e-6)
    judged.clear()
    model = nn.Linear(4, 3).double()
    opt = made(model, lr=0.3, damping=1e-9, adapt=LevenbergMarquardt(every=1))
    for _ in range(3):
        opt.step(lambda: closure(opt, model, MSE, x, y))
    for actual, predicted in judged:
        assert actual == pytest.approx(predicted, rel=1e-6)
    assert len(judged) == 3


def closure(opt: KFAC, model: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    opt.zero_grad()
    z = model(x)
    opt.update_curvature(z)
    value = loss(z, y)
    value.backward()
    return value


def penalty(opt: KFAC) -> Tensor:
    """The diagonal `[P]` of lambda I + weight_decay I; lambda by its definition."""
    found = {p: torch.full_like(p, g["weight_decay"]) for g in opt.param_groups for p in g["params"]}
    for name, layer in opt.preconditioner.layers.items():
        held, value = opt.preconditioner.statistics[name], opt.preconditioner.damping.value
        if opt.preconditioner.damping.relative:
            eigenvalues = torch.linalg.eigvalsh(torch.kron(held.B[0], held.A[0]))
            value *= float(eigenvalues.square().sum() / eigenvalues.sum())
        for p in (layer.weight, layer.bias):
            if p is not None:
                found[p] += value
    return torch.cat([found[p].flatten() for p in opt.model.parameters()])


@pytest.mark.parametrize("relative_damping", [True, False])
@pytest.mark.parametrize("likelihood", ["mse", "cross_entropy"])
@pytest.mark.parametrize("training", [True, False])
def test_step_is_the_least_of_the_dense_model_in_the_span(
    training: bool, likelihood: str, relative_damping: bool
) -> None:
    """Of the preconditioned gradient and the last update, with the exact Gauss-Newton matrix, damping and weight decay."""
    model, (x, y) = noisy().train(training), regression()
    loss, targets = (MSE, y) if likelihood == "mse" else (CE, torch.arange(12) % 3)
    options = Options(groups={"4.*": {"weight_decay": 0.0}, "6.*": {"weight_decay": 0.1}})
    opt = made(model, likelihood, 0.05, weight_decay=0.02, options=options, relative=relative_damping)
    directions, solve = [], opt.preconditioner.directions

    def noted(*arguments: object) -> object:
        found = solve(*arguments)  # type: ignore[arg-type]
        directions.append(torch.cat([found[p].flatten().clone() for p in model.parameters()]))
        return found

    opt.preconditioner.directions = noted  # type: ignore[method-assign]
    update = torch.zeros_like(weights(model))
    for count in range(3):
        before = weights(model)
        G, g = gauss_newton(model, loss, x, targets), gradient(model, loss, x, targets)
        opt.quadratic_step(loss, x, targets)
        decay = penalty(opt) - penalty_without_decay(opt)
        S = torch.stack([-directions[-1], update], 1)[:, : 1 + (count > 0)]
        C = S.T @ (G + penalty(opt).diag()) @ S
        expected = S @ torch.linalg.solve(C, -S.T @ (g + decay * before))
        update = weights(model) - before
        assert relative(update, expected) <= 1e-8
        if count:  # the last update has a part in it
            d = S[:, 0] / S[:, 0].norm()
            assert relative(d.dot(update) * d, update) > 1e-5


def penalty_without_decay(opt: KFAC) -> Tensor:
    kept = [group["weight_decay"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["weight_decay"] = 0.0
    found = penalty(opt)
    for group, decay in zip(opt.param_groups, kept, strict=True):
        group["weight_decay"] = decay
    return found


def test_sum_of_losses_gives_the_steps_of_their_mean(judged: list[Change]) -> None:
    x, y = regression()[0], torch.arange(12) % 3
    start, found = noisy(), []
    for reduction in ("mean", "sum"):
        torch.manual_seed(3)
        model = deepcopy(start)
        options = {"reduction": reduction, "weight_decay": 0.1, "adapt": LevenbergMarquardt(every=1)}
        opt = made(model, "cross_entropy", 0.05, **options)
        for _ in range(3):
            opt.quadratic_step(partial(CE, reduction=reduction), x, y)
        found.append(weights(model))
    assert len(judged) == 6
    for mean, total in zip(judged[:3], judged[3:], strict=True):
        assert total == pytest.approx(mean, rel=1e-8)
    assert relative(found[1], found[0]) <= 1e-9


@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("adapt", [None, LevenbergMarquardt(every=1)])
def test_leaves_the_model_as_one_forward_pass_does(adapt: LevenbergMarquardt | None, kind: str) -> None:
    model, (x, y) = noisy(), regression()
    twin, opt = deepcopy(model), made(model, damping=0.1, kind=kind, adapt=adapt)
    for step in range(3):
        state = torch.get_rng_state()
        twin(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        opt.quadratic_step(MSE, x, y)
        assert torch.equal(torch.get_rng_state(), after)
        for name, buffer in twin.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
        assert all(module.training for module in model.modules())
        twin.load_state_dict(model.state_dict())
        assert int(model[1].num_batches_tracked) == step + 1
        statistics = opt.preconditioner.statistics.values()
        assert not any(held.used for held in statistics)
        assert not opt.preconditioner.gathering.capture.uses


@pytest.mark.parametrize("approximation", ["kfac", "ekfac"])
def test_the_penalty_is_that_of_the_inverse_in_use(approximation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(12, 3)).double()
    opt = made(model, damping=0.3, relative=True, approximation=approximation)
    blocks = opt.preconditioner.blocks
    delta = {p: torch.randn_like(p) for p in model.parameters()}
    assert float(blocks.penalty(delta, delta)) == pytest.approx(
        0.3 * sum(float(d.square().sum()) for d in delta.values())
    )
    for _ in range(2):
        x, y = torch.randn(12, 4, 3, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
        opt.zero_grad()
        z = model(x)
        opt.update_curvature(z)
        MSE(z, y).backward()
        opt.step()
    expected = 0.0
    for name, layer in opt.preconditioner.layers.items():
        scale = blocks.inverses[name].scale.flatten()  # type: ignore[attr-defined]
        square = delta[layer.weight].square().flatten(1).sum(1) + delta[layer.bias].square()
        expected += 0.3 * float((scale * square.view(layer.groups, -1).sum(1)).sum())
    assert float(blocks.penalty(delta, delta)) == pytest.approx(expected)
    of_factors = [blocks.factors(name).scale for name in blocks.layers]
    same = [
        torch.allclose(s, blocks.inverses[n].scale.flatten()) for s, n in zip(of_factors, blocks.layers, strict=True)
    ]  # type: ignore[attr-defined]
    assert all(same) == (approximation == "kfac")


def test_momentum_is_that_of_the_last_update_and_helps() -> None:
    """On an ill-conditioned quadratic that K-FAC only knows in part, as conjugate gradients do."""
    x, y = regression(40)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    losses = []
    for momentum in (True, False):
        copy = deepcopy(model)
        opt = made(copy, damping=1e-3)
        for _ in range(12):
            opt.quadratic_step(MSE, x, y)
            if not momentum:
                for state in opt.state.values():
                    state.pop("update")
        losses.append(float(MSE(copy(x), y).detach()))
    assert losses[0] < 0.9 * losses[1]


def test_loss_that_is_not_finite_changes_nothing() -> None:
    model, (x, y) = noisy().eval(), regression()
    opt = made(model, damping=0.1)
    opt.quadratic_step(MSE, x, y)
    before, factors = weights(model), {n: s.B.clone() for n, s in opt.preconditioner.statistics.items()}
    opt.quadratic_step(lambda z, t: MSE(z, t) * float("nan"), x, y)
    assert torch.equal(weights(model), before)
    assert all(torch.equal(s.B, factors[n]) for n, s in opt.preconditioner.statistics.items())
    opt.quadratic_step(MSE, x, y)
    assert not torch.equal(weights(model), before)


# ---- Levenberg-Marquardt


@pytest.mark.parametrize(
    ("ratio", "change"), [(1.0, 0.9), (0.76, 0.9), (0.74, 1), (0.26, 1), (0.24, 1 / 0.9), (-3.0, 1 / 0.9)]
)
def test_rule(ratio: float, change: float) -> None:
    rule = LevenbergMarquardt(every=2, factor=0.9**0.5, least=0.01, most=5.0)
    assert rule.adapted(1.0, ratio) == pytest.approx(change)
    assert rule.adapted(1.0, float("nan")) == pytest.approx(1 / 0.9)
    assert rule.adapted(0.01, 1.0) == 0.01
    assert rule.adapted(5.0, -1.0) == 5.0


def sine(start: float = 1.4) -> nn.Sequential:
    """sin w: a Gauss-Newton step from here leads far away, to a sine about as large."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Sine()).double()
    nn.init.constant_(model[0].weight, start)
    return model


ONE, ZERO = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)


def through_closure(opt: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    opt.step(lambda: closure(opt, model, MSE, x, y))


def through_quadratic_step(opt: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    opt.quadratic_step(MSE, x, y)


@pytest.mark.parametrize("take", [through_closure, through_quadratic_step])
def test_damping_rises_after_a_bad_step_and_falls_after_good_ones(take: Callable[..., None]) -> None:
    rule = LevenbergMarquardt(every=1, factor=0.8)
    model = sine()
    opt = made(model, damping=1e-3, lr=1.0, momentum=0.0, adapt=rule)
    take(opt, model, ONE, ZERO)
    assert opt.param_groups[0]["damping"] == pytest.approx(1e-3 / 0.8)
    model = sine(0.3)
    opt = made(model, damping=1e-3, lr=1.0, momentum=0.0, adapt=rule)
    take(opt, model, ONE, ZERO)
    assert opt.param_groups[0]["damping"] == pytest.approx(1e-3 * 0.8)
    take(opt, model, ONE, ZERO)  # the next step is taken with it
    assert opt.preconditioner.blocks.dampings == {"0": pytest.approx(1e-3 * 0.8)}


@pytest.mark.parametrize("take", [through_closure, through_quadratic_step])
def test_damping_is_adapted_every_so_many_steps(take: Callable[..., None]) -> None:
    model, (x, y) = nn.Linear(4, 3).double(), regression()
    opt = made(model, damping=1.0, lr=0.05, momentum=0.0, adapt=LevenbergMarquardt(every=3, factor=0.9))
    dampings = []
    for _ in range(7):
        take(opt, model, x, y)
        dampings.append(opt.param_groups[0]["damping"])
    assert dampings == pytest.approx([1, 1, 0.9**3, 0.9**3, 0.9**3, 0.9**6, 0.9**6])


@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_second_evaluation_of_the_closure_leaves_no_trace(set_to_none: bool, kind: str) -> None:
    """Training with and without adaptation is the same but for the damping, which a neutral rule leaves as it is."""
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    neutral, start, outcomes = LevenbergMarquardt(every=2, least=0.1, most=0.1), noisy(), []
    for adapt in (None, neutral):
        torch.manual_seed(5)
        model, losses = deepcopy(start), []
        opt = made(model, "cross_entropy", 0.1, kind=kind, adapt=adapt, factor_interval=3)

        def evaluated() -> Tensor:
            opt.zero_grad(set_to_none=set_to_none)  # noqa: B023
            z = model(x)  # noqa: B023
            opt.update_curvature(z)  # noqa: B023
            loss = CE(z, y)
            loss.backward()
            losses.append(float(loss.detach()))  # noqa: B023
            return loss

        for _ in range(5):
            opt.step(evaluated)
        gradients = [p.grad for p in model.parameters()]
        outcomes.append((model, opt, losses, torch.get_rng_state(), gradients))
    (plain, a, once, state, g), (adapted, b, twice, other_state, h) = outcomes
    assert (len(once), len(twice)) == (5, 7)
    assert [twice[i] for i in (0, 1, 3, 4, 6)] == once
    assert torch.equal(state, other_state)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(adapted.state_dict()[name], tensor), name
    assert all(torch.equal(u, v) for u, v in zip(g, h, strict=True))
    assert torch.equal(
        a.preconditioner.gathering.generator.get_state(), b.preconditioner.gathering.generator.get_state()
    )
    for name, held in a.preconditioner.statistics.items():
        assert torch.equal(b.preconditioner.statistics[name].A, held.A)
        assert torch.equal(b.preconditioner.statistics[name].B, held.B)
    assert a.preconditioner.intervals.state_dict() == b.preconditioner.intervals.state_dict()


@pytest.mark.parametrize("take", ["closure", "quadratic_step"])
def test_both_losses_are_of_the_same_masks(take: str, judged: list[Change]) -> None:
    """Without a step, the change of the loss is zero."""
    model, (x, y) = noisy(), regression()
    opt = made(model, damping=0.1, lr=0.0, adapt=LevenbergMarquardt(every=1))
    if take == "closure":
        opt.step(lambda: closure(opt, model, MSE, x, y))
    else:
        opt.preconditioner.directions, solve = (  # type: ignore[method-assign]
            lambda decay: {p: torch.zeros_like(d) for p, d in solve(decay).items()},
            opt.preconditioner.directions,
        )
        opt.quadratic_step(MSE, x, y)
    assert judged == [(0.0, 0.0)]
