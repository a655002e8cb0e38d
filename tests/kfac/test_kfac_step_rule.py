"""Step rules: Adam in the eigenbasis against a dense implementation, lengths that F cannot change, and what they are for."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import (
    KFAC,
    STEP_RULES,
    Damping,
    Fisher,
    KFACPreconditioner,
    LevenbergMarquardt,
    Options,
    StepRule,
)
from secondorder.kfac.inverses.eigenbasis import Rotated
from secondorder.kfac.rule_updates import EPS

RULES = [name for name in STEP_RULES if name != "natural"]
BOUNDED = [name for name, rule in STEP_RULES.items() if rule.length != "free"]
FIXED = [name for name, rule in STEP_RULES.items() if rule.length == "fixed"]


def small(dtype: torch.dtype = torch.float64, norm: bool = True) -> nn.Sequential:
    """A convolution with groups and without bias, batch norm, and a linear layer with one."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3)).to(dtype)


def batches(dtype: torch.dtype = torch.float64, count: int = 6) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(8, 2, 4, 4, generator=generator, dtype=dtype)
        yield images, torch.randint(3, (8,), generator=generator)


def step(model: nn.Module, optimizer: KFAC, batch: tuple[Tensor, Tensor], scale: float = 1.0) -> float:
    optimizer.zero_grad()
    logits = model(batch[0])
    optimizer.update_curvature(logits)
    loss = scale * F.cross_entropy(logits, batch[1])
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# ----------------------------------------------------------------------------------------------- against dense truth


class Dense:
    """Adam in the eigenbasis of the whole Kronecker product, one group after the other, with vectors."""

    def __init__(self, rule: StepRule, beta: float) -> None:
        self.rule, self.beta, self.steps = rule, beta, 0
        self.m: list[Tensor] = []
        self.v: list[Tensor] = []

    def update(self, matrices: list[Tensor], bases: list[Tensor]) -> list[Tensor]:
        """Of gradients `[O, D]` of the groups of a layer."""
        self.steps += 1
        g = [matrix.flatten() for matrix in matrices]
        if self.steps == 1:
            self.m, self.v = [torch.zeros_like(x) for x in g], [torch.zeros_like(x) for x in g]
        self.m = [self.beta * m + (1 - self.beta) * x for m, x in zip(self.m, g, strict=True)]
        decay = self.rule.decay
        self.v = [decay * v + (1 - decay) * (Q.T @ x) ** 2 for v, x, Q in zip(self.v, g, bases, strict=True)]
        nesterov = [self.beta * m + (1 - self.beta) * x for m, x in zip(self.m, g, strict=True)]
        corrected = [m / (1 - self.beta**self.steps) for m in self.m]
        directions = corrected if self.rule.length == "free" else nesterov
        v = [x / (1 - decay**self.steps) for x in self.v]
        least = EPS * torch.cat(v).mean().sqrt()
        found = [Q @ ((Q.T @ m) / (x.sqrt() + least)) for m, x, Q in zip(directions, v, bases, strict=True)]
        size = torch.cat(found).square().mean().sqrt()
        if self.rule.length != "free":
            agreement = size.clamp_max(1) if self.rule.length == "signal" else 1.0
            found = [self.rule.rms * agreement * u / size for u in found]
        return [u.view_as(matrix) for u, matrix in zip(found, matrices, strict=True)]


@pytest.mark.parametrize(
    ("name", "approximation", "momentum"),
    [
        *((name, "kfac", momentum) for name in ("adam", "adam_fixed", "adam_free") for momentum in (0.9, 0.0)),
        ("adam", "ekfac", 0.9),  # whose bases are found in another way, and used in the same
    ],
)
def test_it_is_adam_in_the_eigenbasis(name: str, approximation: str, momentum: float) -> None:
    model = small()
    optimizer = KFAC(
        model, 0.05, step_rule=name, momentum=momentum, approximation=approximation, factor_interval=1, inverse_interval=2
    )  # fmt: skip
    dense = {layer: Dense(STEP_RULES[name], momentum) for layer in optimizer.preconditioner.layers}
    for batch in batches():
        before = {p: p.detach().clone() for p in model.parameters()}
        step(model, optimizer, batch)
        for key, layer in optimizer.preconditioner.layers.items():
            inverse = optimizer.preconditioner.blocks.inverses[key]
            assert isinstance(inverse, Rotated)
            bases = [torch.kron(B, A) for B, A in zip(inverse.Q_B, inverse.Q_A, strict=True)]
            assert layer.weight.grad is not None
            g = layer.matrix(layer.weight.grad, None if layer.bias is None else layer.bias.grad)
            expected = torch.stack(dense[key].update(list(g), bases))
            weight, bias = layer.parts(expected)
            torch.testing.assert_close(before[layer.weight] - layer.weight, 0.05 * weight, rtol=1e-6, atol=1e-8)
            if layer.bias is not None:
                torch.testing.assert_close(before[layer.bias] - layer.bias, 0.05 * bias, rtol=1e-6, atol=1e-8)


def test_natural_adam_is_adam_on_preconditioned_gradients() -> None:
    model = small(norm=False)
    twin = copy.deepcopy(model)
    optimizer = KFAC(model, 0.01, step_rule="natural_adam")
    preconditioner = KFACPreconditioner(twin)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01, betas=(0.9, 0.95), eps=0.0)
    for images, labels in batches():
        step(model, optimizer, (images, labels))
        twin.zero_grad()
        logits = twin(images)
        preconditioner.update_curvature(logits)
        F.cross_entropy(logits, labels).backward()
        preconditioner.step()
        adam.step()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=10 * EPS)  # Adam's own eps is another one


@pytest.mark.parametrize("name", RULES)
def test_parameters_without_factors_take_the_steps_of_adam(name: str) -> None:
    model = small()
    norm = model[1]
    twin = copy.deepcopy(norm)
    optimizer = KFAC(model, 0.01, step_rule=name)
    adam = torch.optim.Adam(twin.parameters(), lr=0.01)
    for batch in batches():
        step(model, optimizer, batch)
        for own, other in zip(norm.parameters(), twin.parameters(), strict=True):
            other.grad = own.grad
        adam.step()
    for own, other in zip(norm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- lengths


def lengths(model: nn.Sequential, before: list[Tensor]) -> list[float]:
    """Root mean squares of the updates of the convolution and of the linear layer with its bias."""
    steps = [b - a.detach() for a, b in zip(model.parameters(), before, strict=True)]
    return [
        float(steps[0].square().mean().sqrt()),
        float(torch.cat([s.flatten() for s in steps[-2:]]).square().mean().sqrt()),
    ]


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e9])
def test_a_fixed_length_depends_on_nothing_but_the_learning_rate(name: str, scale: float) -> None:
    model = small()
    optimizer = KFAC(model, step_rule=name, options=Options(check=False))
    for turn, batch in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = 0.03 / (turn + 1)
        before = weights(model)
        step(model, optimizer, batch, scale)
        assert lengths(model, before) == pytest.approx([0.2 * 0.03 / (turn + 1)] * 2, rel=1e-6)


@pytest.mark.parametrize("direction", ["natural", "eigenbasis"])
@pytest.mark.parametrize(("signs", "agreement"), [((1.0, 1.0), 1.0), ((1.0, -1.0), 0.9 * 0.1 / 1.9 + 0.1)])
def test_a_signal_length_is_how_far_the_gradients_agree(
    direction: str, signs: tuple[float, float], agreement: float
) -> None:
    """Of gradients that are all the same, and of those that turn around in every step, for which m is (-1)^t g 0.1 / 1.9."""
    model = small(norm=False)
    rule, options = StepRule(direction, "signal", decay=0.9), Options(check=False, warm_up=False)
    optimizer = KFAC(model, 1e-9, step_rule=rule, factor_interval=1000, inverse_interval=1000, options=options)
    batch = next(batches())
    for turn in range(80):
        before = weights(model)
        step(model, optimizer, batch, scale=signs[turn % 2])
    found = lengths(model, before)
    assert found[0] == pytest.approx(0.2 * 1e-9 * agreement, rel=1e-3)
    assert found[1] <= 0.2 * 1e-9 * agreement * 1.001  # in an eigenbasis it has directions without gradient


@pytest.mark.parametrize("name", ["adam", "adam_free", "adam_fixed"])
def test_the_momentum_goes_over_to_a_renewed_eigenbasis(name: str) -> None:
    """It is the running mean of the gradients, whatever the basis it is kept in."""
    model = small(norm=False)
    optimizer = KFAC(model, 0.01, step_rule=name, factor_interval=1, inverse_interval=2)
    blocks, seen = optimizer.preconditioner.blocks, []
    for batch in batches():
        step(model, optimizer, batch)
        name_of, layer = next(iter(blocks.layers.items()))
        basis = blocks.eigenbases()[name_of]
        seen.append(
            (
                layer.matrix(layer.weight.grad, None),
                basis.rotated_back(optimizer.state[layer.weight]["momentum_buffer"]),
            )
        )  # type: ignore[arg-type]
    m = torch.zeros_like(seen[0][1])
    for g, own in seen:
        m = 0.9 * m + 0.1 * g
        torch.testing.assert_close(own, m)


@pytest.mark.parametrize("name", RULES)
def test_the_learning_rate_acts_on_every_step(name: str) -> None:
    sizes = []
    for lr in (0.01, 0.1):
        model = small()
        optimizer, before = KFAC(model, lr, step_rule=name), weights(model)
        step(model, optimizer, next(batches()))
        sizes.append(lengths(model, before))
    assert [b / a for a, b in zip(*sizes, strict=True)] == pytest.approx([10.0, 10.0], rel=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_layer_without_gradient_stays(name: str, dtype: torch.dtype) -> None:
    model = small(dtype, norm=False)
    optimizer = KFAC(model, step_rule=name, weight_decay=0.0)
    with torch.no_grad():
        model[4].weight.zero_()  # nothing reaches the convolution
    before = model[0].weight.detach().clone()
    step(model, optimizer, next(batches(dtype)))
    assert torch.equal(model[0].weight, before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("name", BOUNDED)
def test_a_gradient_that_vanishes_ends_the_walk(name: str) -> None:
    """Its momentum is not scaled up for ever, to rounding errors and beyond the range of numbers."""
    for vanished in (0.0, 1e-30):
        model = small(torch.float32, norm=False)
        optimizer = KFAC(
            model, 0.03, step_rule=name, momentum=0.8, options=Options(check=False), factor_interval=2000
        )  # in 300 steps m falls by 29 decades, its square leaves the range of numbers after 200
        every = list(batches(torch.float32))
        for batch in every:
            step(model, optimizer, batch)
        before = weights(model)
        for _ in range(150):
            step(model, optimizer, every[0], scale=vanished)
        if (
            STEP_RULES[name].direction == "eigenbasis"
        ):  # a tiny gradient that stays is followed again, once m and v are of its size
            assert max(lengths(model, before)) < 40 * 0.2 * 0.03
        if vanished == 0.0:
            assert lengths(model, before) == [0.0, 0.0]
        for _ in range(150 if vanished else 0):
            step(model, optimizer, every[0], scale=vanished)
        assert all(bool((p.abs() < 100).all()) for p in model.parameters())


@pytest.mark.parametrize("name", STEP_RULES)
def test_the_memory_format_makes_no_difference(name: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    one, two = (KFAC(m, 0.01, step_rule=name) for m in (model, other))
    for batch in batches():
        step(model, one, batch)
        step(other, two, batch)
    for own, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, same, rtol=1e-6, atol=1e-8)


def no_eigenbasis() -> dict[str, dict[str, Any]]:
    return {"cholesky": {"damping": Damping(inverse="cholesky")}, "wide": {"options": Options(wide_inputs=2)}}


@pytest.mark.parametrize("case", no_eigenbasis())
def test_layers_without_an_eigenbasis_go_in_the_natural_direction(case: str) -> None:
    model, other = small(norm=False), small(norm=False)
    one = KFAC(model, step_rule="adam", **no_eigenbasis()[case])
    two = KFAC(other, step_rule=StepRule("natural", "signal"), **no_eigenbasis()[case])
    step(model, one, next(batches()))
    step(other, two, next(batches()))
    assert torch.equal(model[4].weight, other[4].weight)
    assert torch.equal(model[4].bias, other[4].bias)


@pytest.mark.parametrize("case", no_eigenbasis())
def test_the_natural_direction_has_no_free_length_beside_an_eigenbasis(case: str) -> None:
    model = small(norm=False)
    optimizer, before = KFAC(model, 0.01, step_rule="adam_free", **no_eigenbasis()[case]), weights(model)
    step(model, optimizer, next(batches()))
    assert lengths(model, before)[1] == pytest.approx(0.2 * 0.01, rel=1e-6)


def test_a_layer_that_gets_an_eigenbasis_begins_anew() -> None:
    """The momentum of P g means nothing to g. With fewer rows than inputs the layer has no eigenbasis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 3)).double()
    optimizer = KFAC(model, options=Options(wide_inputs=2, warm_up=False), factor_interval=1, inverse_interval=1)
    counts = []
    for rows in (8, 8, 8, 40, 40):
        batch = torch.randn(rows, 17, dtype=torch.float64), torch.arange(rows) % 3
        step(model, optimizer, batch)
        counts.append(optimizer.state[model[0].weight]["squares"])
    assert counts == [1, 2, 3, 1, 2]


# ------------------------------------------------------------------------------------------------ what they are for


def separable(step_rule: str, seed: int, enough: float = math.inf, **settings: Any) -> tuple[float, float]:
    """Worst batch loss after 20 steps, and norm of the weights at the end, on two classes that can be told apart exactly.

    A training whose loss was above `enough` ends there.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 20, generator=generator)
    y = (x[:, 0] + 0.3 * torch.randn(512, generator=generator) > 0).long()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = KFAC(model, 0.03, step_rule=step_rule, fisher=Fisher(seed=seed), **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    worst = 0.0
    for turn in range(600):
        rows = torch.randperm(512, generator=generator)[:32]
        loss = step(model, optimizer, (x[rows], y[rows]))
        worst = max(worst, loss) if turn > 20 else 0.0
        if worst > enough:
            break
        schedule.step()
    return worst, float(torch.cat([p.detach().flatten() for p in model.parameters()]).norm())


@pytest.mark.parametrize("seed", [0, 1])
def test_separable_classes_do_not_blow_it_up(seed: int) -> None:
    worst, norm = separable("adam", seed)
    assert worst < 1.0
    assert norm < 60
    assert separable("natural", seed, enough=2.0, clip=None)[0] > 2.0  # its metric vanishes with the loss


# --------------------------------------------------------------------------------------------------------- plumbing


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_training_takes_the_same_steps(name: str) -> None:
    every = list(batches(count=9))
    model = small()
    optimizer = KFAC(model, step_rule=name, factor_interval=2, inverse_interval=3)
    for batch in every[:5]:
        step(model, optimizer, batch)
    twin = copy.deepcopy(model)
    other = KFAC(twin, step_rule=name, factor_interval=2, inverse_interval=3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in every[5:]:
        step(model, optimizer, batch)
        step(twin, other, batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_batches_in_parts_are_whole_batches(name: str) -> None:
    model = small(norm=False)
    twin = copy.deepcopy(model)
    optimizer, other = (KFAC(m, step_rule=name, fisher="exact") for m in (model, twin))
    for images, labels in batches():
        step(model, optimizer, (images, labels))
        other.zero_grad()
        for part in (slice(0, 4), slice(4, 8)):
            logits = twin(images[part])
            other.update_curvature(logits)
            (F.cross_entropy(logits, labels[part]) / 2).backward()
        other.step()
    for own, same in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, same, rtol=1e-6, atol=1e-8)


def test_weights_decay_whatever_the_rule() -> None:
    for name in RULES:
        model, plain = small(), small()
        one, two = KFAC(model, 0.1, step_rule=name, weight_decay=0.5), KFAC(plain, 0.1, step_rule=name)
        start = weights(model)
        step(model, one, next(batches()))
        step(plain, two, next(batches()))
        for decayed, other, before in zip(model.parameters(), plain.parameters(), start, strict=True):
            torch.testing.assert_close(decayed, other - 0.05 * before)


def test_a_state_of_another_rule_is_refused() -> None:
    model = small()
    optimizer = KFAC(model, step_rule="natural")
    step(model, optimizer, next(batches()))
    state = optimizer.state_dict()
    with pytest.raises(InputError, match="state of another step rule: natural, free, and it is eigenbasis, signal now"):
        KFAC(small()).load_state_dict(state)
    KFAC(small(), step_rule="natural").load_state_dict(state)


def test_half_precision_weights_are_refused() -> None:
    with pytest.raises(InputError, match=r"0\.weight is float16, .* or step_rule='natural'"):
        KFAC(small().half())


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "a name": (lambda: KFAC(small(), step_rule="foo"), "unknown step_rule 'foo'; choose one of: adam, natural"),
    "a number": (lambda: KFAC(small(), step_rule=3), "unknown step_rule 3"),  # type: ignore[arg-type]
    "a direction": (lambda: StepRule("up", "fixed"), "unknown direction 'up'"),
    "a length": (lambda: StepRule("natural", "short"), "unknown length 'short'"),
    "no length": (lambda: StepRule("natural", "fixed", rms=0.0), "rms 0.0: must be above 0"),
    "a decay": (lambda: StepRule("natural", "fixed", decay=1.0), "decay 1.0: must be a number in"),
    "infinite": (lambda: StepRule("natural", "fixed", rms=math.inf), "rms inf: must be a number in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rules_are_refused(case: str) -> None:
    make, words = BAD[case]
    with pytest.raises(InputError, match=words):
        make()


def test_levenberg_marquardt_needs_the_quadratic_model() -> None:
    model = small()
    optimizer = KFAC(model, damping=Damping(adapt=LevenbergMarquardt()))
    with pytest.raises(InputError, match="needs a quadratic model: step_rule='natural', or quadratic_step"):
        optimizer.step(lambda: torch.zeros(()))
