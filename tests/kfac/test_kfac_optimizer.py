"""The update of KFAC against one worked out densely, and what becomes of parameters without factors."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kfac_training import batches, convnet, difference, same, train, weights
from natural import KFAC
from torch import Tensor, nn
from torch.func import jacrev
from torch.nn import functional as F

from secondorder.data import load_dataset
from secondorder.errors import InputError
from secondorder.kfac import Damping, Fisher, Options
from secondorder.networks import network

EVERY_STEP: dict[str, Any] = {"factor_interval": 1, "inverse_interval": 1}

# ---------------------------------------------------------------------------------------------- by hand, and densely


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


class ByHand:
    """K-FAC with the exact Fisher matrix of `mlp` by dense matrices; `of` gives the settings of a parameter."""

    def __init__(
        self, model: nn.Sequential, of: Callable[[str], dict[str, float]], decoupled: bool, clip: float | None
    ):
        self.model, self.of, self.decoupled, self.clip = model, of, decoupled, clip
        self.velocity: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        self.weight = 0.0

    def step(self, x: Tensor, y: Tensor) -> None:
        named = dict(self.model.named_parameters())
        self.average(x)
        gradients = dict(
            zip(named, torch.autograd.grad(F.cross_entropy(self.model(x), y), named.values()), strict=True)
        )
        if not self.decoupled:
            gradients = {name: g + self.of(name)["weight_decay"] * named[name] for name, g in gradients.items()}
        directions = dict(gradients)
        for layer in ("0", "3"):
            own = [name for name in named if name.startswith(layer)]
            W = torch.cat([gradients[name].reshape(len(named[own[0]]), -1) for name in own], 1)
            A, B = self.factors[f"A{layer}"], self.factors[f"B{layer}"]
            block = torch.kron(B, A)
            damping = self.of(own[0])["damping"] * block.square().sum() / block.trace()
            F_layer = block + damping * torch.eye(W.numel(), dtype=W.dtype)
            P = torch.linalg.solve(F_layer, W.flatten()).view_as(W)
            directions |= {own[0]: P[:, : named[own[0]].shape[1]]} | dict.fromkeys(own[1:], P[:, -1])
        if self.clip is not None:
            rate = max(self.of(name)["lr"] for name in gradients)
            weights = {name: self.of(name)["lr"] / rate / (1 - self.of(name)["momentum"]) for name in gradients}
            q = sum(weights[name] ** 2 * (directions[name] * g).sum() for name, g in gradients.items())
            assert q > self.clip**2  # so that there is something to see
            directions = {name: d * self.clip / q**0.5 for name, d in directions.items()}
        with torch.no_grad():
            for name, w in named.items():
                s = self.of(name)
                self.velocity[name] = s["momentum"] * self.velocity.get(name, torch.zeros_like(w)) + directions[name]
                w.mul_(1 - s["lr"] * s["weight_decay"] if self.decoupled else 1).sub_(s["lr"] * self.velocity[name])

    def average(self, x: Tensor) -> None:
        """A = mean a a^T, B = mean J^T (diag p - p p^T) J with J of the logits by the layer's output."""
        with torch.no_grad():
            first, p = self.model[0](x), self.model(x).softmax(1)
            H = p.diag_embed() - p[:, :, None] * p[:, None]
            J = torch.stack([jacrev(self.model[1:])(row[None])[0, :, 0] for row in first])
            inputs = self.model[:3](x)
            new = {
                "A0": F.pad(x, (0, 1), value=1.0).mT @ F.pad(x, (0, 1), value=1.0) / len(x),
                "B0": (J.mT @ H @ J).mean(0),
                "A3": inputs.mT @ inputs / len(x),
                "B3": H.mean(0),
            }
            for name, value in new.items():
                old = self.factors.get(name, torch.zeros_like(value))
                total = 0.9 * self.weight * old + 0.1 * value
                self.factors[name] = total / (0.9 * self.weight + 0.1)
            self.weight = 0.9 * self.weight + 0.1


PLAIN = {"lr": 0.3, "momentum": 0.0, "weight_decay": 0.0, "damping": 0.1}
GROUPS: dict[str, dict[str, float]] = {
    "*.bias": {"weight_decay": 0.0, "lr": 0.1},
    "3.*": {"momentum": 0.5, "damping": 2.0},
}
CASES: dict[str, tuple[dict[str, float], Options, float | None]] = {
    "no momentum": ({}, Options(), None),
    "momentum": ({"momentum": 0.9}, Options(), None),
    "decoupled weight decay": ({"momentum": 0.9, "weight_decay": 0.2}, Options(), None),
    "coupled weight decay": ({"momentum": 0.9, "weight_decay": 0.2}, Options(decoupled=False), None),
    "clip": ({"momentum": 0.9, "weight_decay": 0.2}, Options(), 0.1),
    "clip with coupled weight decay": ({"weight_decay": 0.2}, Options(decoupled=False), 0.1),
    "groups": ({"momentum": 0.9, "weight_decay": 0.2}, Options(groups=GROUPS), None),
    "groups, coupled, clip": ({"weight_decay": 0.2}, Options(groups=GROUPS, decoupled=False), 0.1),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES)
def test_update_is_the_one_by_hand(case: str, reduction: str) -> None:
    changed, options, clip = CASES[case]
    settings = PLAIN | changed

    def of(name: str) -> dict[str, float]:
        if not options.groups:
            return settings
        return settings | (GROUPS["*.bias"] if name.endswith("bias") else GROUPS["3.*"] if name[0] == "3" else {})

    ours, theirs = mlp(), mlp()
    optimizer = KFAC(
        ours,
        **settings,
        ema_decay=0.9,
        fisher=Fisher("exact", reduction=reduction),
        clip=clip,
        options=options,
        **EVERY_STEP,
    )
    by_hand = ByHand(theirs, of, options.decoupled, clip)
    for step in range(4):
        x, y = torch.randn(7, 5).double(), torch.randint(3, (7,))
        train(ours, optimizer, [(x, y)], reduction)
        by_hand.step(x, y)
        assert difference(ours, theirs) < 1e-10, step


def test_absolute_damping_in_the_units_of_the_loss() -> None:
    model = nn.Linear(5, 3).double()
    before = weights(model)
    x, y = torch.randn(7, 5).double(), torch.randn(7, 3).double()
    damping = Damping(0.3, relative=False)
    optimizer = KFAC(model, 1.0, momentum=0.0, damping=damping, fisher=Fisher("exact", "mse"), clip=None)
    logits = model(x)
    optimizer.update_curvature(logits)
    F.mse_loss(logits, y).backward()
    optimizer.step()
    a = F.pad(x, (0, 1), value=1.0)
    G = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    expected = G @ torch.linalg.inv(2 / 3 * a.mT @ a / 7 + 0.3 * torch.eye(6).double())
    torch.testing.assert_close(before["weight"] - model.weight, expected[:, :-1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(before["bias"] - model.bias, expected[:, -1], rtol=1e-10, atol=1e-12)


def test_ekfac_divides_by_the_second_moments_in_the_bases_of_the_first_step() -> None:
    """S = the running mean of sum_n (Q_B^T g a^T Q_A)^2 / N, from the second factor step on."""
    model = nn.Linear(5, 3).double()
    optimizer = KFAC(
        model,
        0.1,
        momentum=0.0,
        ema_decay=0.8,
        factor_interval=1,
        inverse_interval=100,
        fisher="empirical",
        approximation="ekfac",
        clip=None,
        options=Options(warm_up=False),
    )
    S, weight = torch.zeros(3, 6).double(), 0.0
    for step in range(4):
        x, y = torch.randn(9, 5).double(), torch.randint(3, (9,))
        before = torch.cat([model.weight, model.bias[:, None]], 1).detach()
        a, g = F.pad(x, (0, 1), value=1.0), model(x).softmax(1).detach() - F.one_hot(y, 3)
        train(model, optimizer, [(x, y)])
        if step == 0:
            Q_B, Q_A = (torch.linalg.eigh(v.mT @ v)[1] for v in (g, a))
            continue
        squares = torch.einsum("no,nd->nod", g @ Q_B, a @ Q_A).square().mean(0)
        S, weight = 0.8 * S + 0.2 * squares, 0.8 * weight + 0.2
        W = Q_B.mT @ (g.mT @ a / 9) @ Q_A
        expected = Q_B @ (W / (S / weight + 0.01 * S.square().sum() / S.sum() / weight)) @ Q_A.mT
        moved = before - torch.cat([model.weight, model.bias[:, None]], 1).detach()
        torch.testing.assert_close(moved, 0.1 * expected, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------ trust region, lr = 0


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_learning_rate_zero_moves_nothing_and_breaks_nothing(clip: float | None) -> None:
    model = convnet()
    before = weights(model)
    optimizer = KFAC(model, 0.0, clip=clip, weight_decay=0.1)
    train(model, optimizer, batches(3))
    assert same(weights(model), before)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    train(model, optimizer, batches(3))
    assert all(bool(torch.isfinite(w).all()) and not torch.equal(w, before[name]) for name, w in weights(model).items())


def test_the_report_counts_the_steps_that_the_trust_region_shortened() -> None:
    first, factors = KFAC(convnet(), 0.1, clip=None), []
    for clip, expected in ((1e6, 0), (1e-2, 3)):
        model = convnet()
        optimizer = KFAC(model, 0.1, clip=clip, momentum=0.0)
        train(model, optimizer, batches(3))
        count, factor = optimizer.report().shortened
        assert count == expected
        assert (factor < 1) == (expected > 0)
        assert ("trust region: 3 steps shortened, to 0.0" in str(optimizer.report())) == (expected > 0)
        factors.append(factor)
    assert factors[0] == 1.0
    assert first.report().shortened == (0, 1.0)


def test_a_wide_trust_region_changes_nothing_and_a_narrow_one_bounds_the_divergence() -> None:
    data = batches(5, 64)
    free, wide = convnet(), convnet()
    train(free, KFAC(free, 0.1, clip=None), data)
    train(wide, KFAC(wide, 0.1, clip=1e6), data)
    assert same(weights(free), weights(wide))
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 3)).double()
    x, _ = data[0]
    before = model(x).log_softmax(1).detach()
    train(model, KFAC(model, 100.0, momentum=0.0, clip=1e-4, damping=1e-3, fisher="exact"), data[:1])  # lr clip = 1e-2
    KL = F.kl_div(model(x).log_softmax(1), before, log_target=True, reduction="batchmean").item()
    assert pytest.approx(0.5e-4, rel=0.2) == KL


# ---------------------------------------------------------------------------------------- parameters without factors


def test_adam_fallback_is_adam() -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, momentum=0.0, clip=None, options=Options(fallback="adam", fallback_lr=0.2))
    norm = model[1]
    copies = [nn.Parameter(p.detach().clone()) for p in norm.parameters()]
    adam = torch.optim.Adam(copies, 0.1 * 0.2, betas=(0.0, 0.999))
    for batch in batches(5):
        train(model, optimizer, [batch])
        for copied, p in zip(copies, norm.parameters(), strict=True):
            copied.grad = p.grad.clone()
        adam.step()
        for copied, p in zip(copies, norm.parameters(), strict=True):
            torch.testing.assert_close(copied, p, rtol=1e-12, atol=1e-14)


def test_sgd_fallback_is_sgd() -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, momentum=0.8, clip=None, options=Options(fallback_lr=0.2))
    norm = model[1]
    copies = [nn.Parameter(p.detach().clone()) for p in norm.parameters()]
    sgd = torch.optim.SGD(copies, 0.1 * 0.2, momentum=0.8)
    for batch in batches(5):
        train(model, optimizer, [batch])
        for copied, p in zip(copies, norm.parameters(), strict=True):
            copied.grad = p.grad.clone()
        sgd.step()
        for copied, p in zip(copies, norm.parameters(), strict=True):
            torch.testing.assert_close(copied, p, rtol=1e-12, atol=1e-14)


class Words(nn.Module):
    """Embedding, LayerNorm, BatchNorm1d, a parameter of its own and linear layers, for [N, T] words."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, sparse=sparse)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 6)
        self.batch_norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.ones(6))
        self.out = nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.hidden(self.norm(self.embedding(words))).mean(1)
        return self.out(torch.relu(self.batch_norm(x) * self.scale))


@pytest.mark.parametrize("fallback", ["sgd", "adam"])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_parameter_is_trained(sparse: bool, fallback: str) -> None:
    torch.manual_seed(0)
    model = Words(sparse).double()
    words = torch.randint(9, (40, 5))
    labels = (words == 1).sum(1).clamp_max(2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = Options(fallback=fallback, fallback_lr=0.1 if fallback == "adam" else 1.0)
    losses = train(model, KFAC(model, 0.1, clip=30.0, options=options), [(words, labels)] * 15)
    assert losses[-1] < 0.5 * losses[0]
    for name, p in model.named_parameters():
        assert bool((p != before[name]).any(-1).all()), name  # every word, every row


def test_frozen_parameters_stay() -> None:
    model = convnet()
    model[0].weight.requires_grad_(False)
    model[6].requires_grad_(False)
    before = weights(model)
    optimizer = KFAC(model, 0.1, weight_decay=0.1)
    data = batches(3)
    train(model, optimizer, data)
    moved = {name for name, w in weights(model).items() if not torch.equal(w, before[name])}
    assert moved == {"0.bias", "1.weight", "1.bias", "3.weight"}


def test_parameters_that_are_frozen_later_stay() -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, weight_decay=0.1)
    data = batches(3)
    train(model, optimizer, data)
    model[6].requires_grad_(False)
    before = weights(model)
    train(model, optimizer, data)
    moved = {name for name, w in weights(model).items() if not torch.equal(w, before[name])}
    assert moved == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}


class Branches(nn.Module):
    """Two layers of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 3)
        self.use_left = True

    def forward(self, x: Tensor) -> Tensor:
        return (self.left if self.use_left else self.right)(x)


def test_layers_that_are_not_always_used() -> None:
    torch.manual_seed(0)
    model = Branches().double()
    optimizer = KFAC(model, 0.1, weight_decay=0.1, factor_interval=1)
    x, y = torch.randn(12, 5).double(), torch.randint(3, (12,))
    right = weights(model.right)
    train(model, optimizer, [(x, y)])
    assert same(weights(model.right), right)
    model.use_left, left = False, weights(model.left)
    train(model, optimizer, [(x, y)])
    assert same(weights(model.left), left)
    assert not same(weights(model.right), right)
    assert not optimizer.preconditioner.events


# ------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_of_the_optimiser_are_refused(copied: Callable[[object], object]) -> None:
    optimizer = KFAC(convnet(), 0.1)
    with pytest.raises(InputError, match="make a new KFAC of the copied model and load_state_dict"):
        copied(optimizer)
    with pytest.raises(InputError, match="make a new KFAC"):
        copied([optimizer]) if copied is not copy.copy else copied(optimizer)


def test_schedulers_and_saved_models_work_all_the_same() -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        ],
        [2],
    )
    for batch in batches(3):
        train(model, optimizer, [batch])
        scheduler.step()
    copy.deepcopy(scheduler.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same(weights(torch.load(file, weights_only=False)), weights(model))
    twin = copy.deepcopy(model)
    other = KFAC(twin, 0.1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches(3))
    train(twin, other, batches(3))
    assert same(weights(twin), weights(model))


def test_the_trust_region_bounds_the_velocity_and_the_learning_rate_always_acts() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = KFAC(model, 0.5, momentum=0.9, clip=1e-4, fisher="exact", damping=Damping(0.1, relative=False))
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randint(3, (20,))
    lengths = []
    for turn in range(60):
        optimizer.param_groups[0]["lr"] = 0.5 / (turn + 1)
        before = weights(model)
        train(model, optimizer, [(x, y)])
        update = {p: p.detach() - before[name] for name, p in model.named_parameters()}
        blocks = optimizer.preconditioner.blocks
        length = float(blocks.quadratic_form(update) + blocks.penalty(update, update)) ** 0.5
        lengths.append(length / optimizer.param_groups[0]["lr"])
    assert lengths[0] == pytest.approx(0.1 * 1e-4, rel=1e-6)  # |d| = (1 - momentum) clip
    assert 0.95e-4 < lengths[-1] < 1e-4 * (1 + 1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_first_step_is_as_long_as_the_learning_rate(momentum: float) -> None:
    """Also where the trust region decides on the direction's length."""
    sizes = []
    for lr in (0.01, 0.1, 1.0):
        model = convnet()
        before = weights(model)
        optimizer = KFAC(model, lr, momentum=momentum, clip=1e-3)
        train(model, optimizer, batches(1))
        assert optimizer.report().shortened[0] == 1
        sizes.append(sum(float((w - before[name]).square().sum()) for name, w in weights(model).items()) ** 0.5 / lr)
    assert sizes == pytest.approx(sizes[:1] * 3, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_longer_than_the_weights_are_counted(momentum: float) -> None:
    model = convnet()
    optimizer = KFAC(model, 1e-3, momentum=momentum)
    train(model, optimizer, batches(2))
    assert optimizer.report().exploded == 0
    optimizer.param_groups[0]["lr"] = 1e4
    train(model, optimizer, batches(1))
    assert optimizer.report().exploded == 1
    assert "1 steps were longer than all weights together" in str(optimizer.report())


# ------------------------------------------------------------------------------------------------- reductions, truth


@pytest.mark.parametrize("fisher", ["mc", "empirical", "exact"])
def test_reduction_sum_trains_as_mean(fisher: str) -> None:
    models = {}
    for reduction in ("mean", "sum"):
        models[reduction] = convnet()
        optimizer = KFAC(
            models[reduction],
            0.1,
            weight_decay=0.1,
            fisher=Fisher(fisher, reduction=reduction),
            approximation={"0": "ekfac"},
            clip=1e-2,
            options=Options(decoupled=False),
        )
        train(models[reduction], optimizer, batches(8), reduction)
    assert difference(models["sum"], models["mean"]) < 1e-10


def test_direction_is_not_the_gradient_on_a_trained_network() -> None:
    """The cosine of update and gradient of every layer, after training to 95 % of the digits."""
    data = load_dataset("digits", limit=512).train
    images, labels = (torch.stack([torch.as_tensor(data[i][k]) for i in range(512)]) for k in (0, 1))
    torch.manual_seed(0)
    model = network("digits_net", "gap", 10, 1)
    optimizer = KFAC(model, 0.03)
    order = [torch.randperm(512)[:64] for _ in range(30)]
    train(model, optimizer, [(images[chosen], labels[chosen]) for chosen in order])
    model.eval()
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9
    model.train()
    optimizer.zero_grad()
    logits = model(images)
    optimizer.update_curvature(logits)
    F.cross_entropy(logits, labels).backward()
    directions = optimizer.preconditioner.directions()
    assert directions is not None
    for name, layer in optimizer.preconditioner.layers.items():
        cosine = F.cosine_similarity(directions[layer.weight].flatten(), layer.weight.grad.flatten(), 0).item()
        assert 0 < cosine < 0.9, name
