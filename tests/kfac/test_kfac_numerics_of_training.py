"""Training through bad batches and degenerate curvature: what is not finite touches nothing, the rest stays finite."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from kfac_training import KINDS, Batch, batches, convnet, same, snapshot, train, weights
from natural import KFAC
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.kfac import Damping, Fisher, KFACPreconditioner, Options

SKIPPED = "step with gradients that are not finite, skipped"
DROPPED = "factors that are not finite, dropped"


def everything(model: nn.Module, optimizer: KFAC) -> Any:
    """All that a step may change, but the state of the random numbers and the count of events."""
    state = snapshot({"optimizer": optimizer.state_dict(), "model": weights(model)})
    del state["optimizer"]["kfac"]["events"]
    return state


def finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(w).all()) for w in weights(model).values())


# ----------------------------------------------------------------------------------------------------- bad batches


def nan_input(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    train(model, optimizer, [(x * float("nan"), y)])


def one_infinite_pixel(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    bad = x.clone()
    bad[3, 1, 2, 2] = float("inf")
    train(model, optimizer, [(bad, y)])


def infinite_loss(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    logits = model(x)
    optimizer.update_curvature(logits)
    (F.cross_entropy(logits, y) * float("inf")).backward()
    optimizer.step()


def one_gradient(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    logits = model(x)
    optimizer.update_curvature(logits)
    F.cross_entropy(logits, y).backward()
    model.get_parameter("1.bias").grad[2] = float("nan")  # type: ignore[index]
    optimizer.step()


@cache
def undisturbed(**settings: Any) -> dict[str, Tensor]:
    """The weights of a training without a bad batch."""
    model = convnet()
    train(model, KFAC(model, 0.05, factor_interval=4, clip=0.1, weight_decay=0.1, **settings), batches(13))
    return weights(model)


@pytest.mark.parametrize("bad", [nan_input, one_infinite_pixel, infinite_loss, one_gradient])
@pytest.mark.parametrize(
    ("settings", "at"),
    [
        *(({"fisher": "exact"}, at) for at in (0, 3, 10)),
        *(({"fisher": "empirical", "approximation": "ekfac"}, at) for at in (0, 3, 10)),
        ({}, 3),
    ],
)
def test_a_batch_that_is_not_finite_touches_nothing(
    settings: dict[str, Any], at: int, bad: Callable[..., None]
) -> None:
    data = batches(13)
    model = convnet()
    optimizer = KFAC(model, 0.05, factor_interval=4, clip=0.1, weight_decay=0.1, **settings)
    train(model, optimizer, data[:at])
    before = everything(model, optimizer)
    for _ in range(2):
        bad(optimizer, model, *data[at])
    assert same(everything(model, optimizer), before)
    assert optimizer.report().events == {SKIPPED: 2}
    train(model, optimizer, data[at:])
    if settings:  # no random numbers: as if the batch had never been
        assert same(weights(model), undisturbed(**settings))
    assert finite(model)


def test_preconditioner_says_when_a_step_is_better_left_out() -> None:
    model = convnet()
    pre, sgd = KFACPreconditioner(model, fisher="empirical"), torch.optim.SGD(model.parameters(), 0.1)
    for x, y in batches(2):
        for factor, good in ((float("nan"), False), (1.0, True)):
            sgd.zero_grad()
            F.cross_entropy(model(x * factor), y).backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            assert pre.step() == good
            if not good:
                for p, gradient in zip(model.parameters(), gradients, strict=True):
                    torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0, equal_nan=True)
    assert pre.report().steps == 2


def overflowing() -> tuple[nn.Module, Batch]:
    """Inputs of 1e25 and output gradients of 1e-26: the weight's gradient is finite in float32, A is not."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.mul_(1e-25)
    return model, (torch.randn(6, 4) * 1e25, torch.randint(3, (6,)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_that_overflow_are_dropped(reduction: str) -> None:
    """At first nothing moves; later the factors of before are used."""
    model, (x, y) = overflowing()
    options = Options(check=False)  # of the scale of the loss
    optimizer = KFAC(model, 0.1, fisher=Fisher(reduction=reduction), options=options, factor_interval=1)

    def step(x: Tensor, scale: float) -> None:
        optimizer.zero_grad()
        logits = model(x)
        optimizer.update_curvature(logits)
        (F.cross_entropy(logits, y, reduction=reduction) * scale).backward()
        optimizer.step()

    before = weights(model)
    step(x, 1e-25)
    assert optimizer.report().events == {DROPPED: 1}
    assert same(weights(model), before)
    assert optimizer.report().steps == 0
    step(x / 1e25, 1.0)
    factors = snapshot(optimizer.state_dict()["kfac"]["statistics"])
    before = weights(model)
    step(x, 1e-25)
    assert optimizer.report().events == {DROPPED: 2}
    assert same(optimizer.state_dict()["kfac"]["statistics"], factors)
    assert finite(model)
    assert not same(weights(model), before)


# -------------------------------------------------------------------------------------------- degenerate curvature


def plain() -> nn.Module:
    return convnet()


def with_a_dead_layer() -> nn.Module:
    """The inputs of the second convolution are all zero, so are its factors and those before it."""
    model = convnet()
    with torch.no_grad():
        model[1].bias.fill_(-100)
    return model


def with_equal_channels() -> nn.Module:
    model = convnet()
    with torch.no_grad():
        model[0].weight[1:] = model[0].weight[0]
        model[0].bias[1:] = model[0].bias[0]
    return model


DEGENERATE: dict[str, tuple[Callable[[], nn.Module], Callable[[Batch], Batch], float]] = {
    "one sample": (plain, lambda b: (b[0][:1], b[1][:1]), 1.0),
    "the same sample again and again": (plain, lambda b: (b[0][:1].expand(12, -1, -1, -1), b[1][:1].expand(12)), 1.0),
    "constant images": (plain, lambda b: (torch.ones_like(b[0]), b[1]), 1.0),
    "black images": (plain, lambda b: (torch.zeros_like(b[0]), b[1]), 1.0),
    "zero gradients": (plain, lambda b: b, 0.0),
    "a dead layer": (with_a_dead_layer, lambda b: b, 1.0),
    "equal channels": (with_equal_channels, lambda b: b, 1.0),
    "huge inputs": (plain, lambda b: (b[0] * 1e8, b[1]), 1.0),
    "tiny inputs": (plain, lambda b: (b[0] * 1e-12, b[1]), 1.0),
    "sure of the labels": (lambda: scaled(1e4), lambda b: b, 1.0),
}


def scaled(factor: float) -> nn.Module:
    model = convnet()
    with torch.no_grad():
        model[6].weight.mul_(factor)
    return model


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *(
            (kind, torch.float32)
            for kind in ("kfac", "ekfac", "cholesky", "wide", "wide cholesky", "empirical", "clip")
        ),
        *(
            (kind, torch.float64) for kind in ("kfac", "wide cholesky")
        ),  # whose range and digits are larger: the easy one
    ],
)
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_curvature_stays_finite(case: str, kind: str, dtype: torch.dtype) -> None:
    made, changed, scale = DEGENERATE[case]
    model = made().to(dtype)
    settings = {"clip": 1.0, **KINDS[kind]}
    settings["options"] = Options(wide_inputs=settings.get("options", Options()).wide_inputs, check=False)
    optimizer = KFAC(model, 1e-3, **settings)
    for batch in batches(4):
        x, y = changed(batch)
        optimizer.zero_grad()
        logits = model(x.to(dtype))
        optimizer.update_curvature(logits)
        (F.cross_entropy(logits, y) * scale).backward()
        optimizer.step()
    assert finite(model)
    assert finite_state(optimizer.state_dict())
    assert optimizer.report().steps == 4
    assert {e for e in optimizer.report().events if "no curvature" not in e} <= {"jitter", "float64"}


def finite_state(state: Any) -> bool:
    if isinstance(state, dict):
        return all(finite_state(value) for value in state.values())
    return not isinstance(state, Tensor) or not state.is_floating_point() or bool(torch.isfinite(state).all())


def test_zero_gradients_leave_the_weights_alone() -> None:
    """And weight decay and momentum go on."""
    for decay in (0.0, 0.5):
        model = convnet()
        before = weights(model)
        optimizer = KFAC(model, 0.1, momentum=0.0, weight_decay=decay, fisher="empirical")
        x, y = batches(1)[0]
        for _ in range(3):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) * 0).backward()
            optimizer.step()
        for name, w in weights(model).items():
            torch.testing.assert_close(w, before[name] * (1 - 0.1 * decay) ** 3, rtol=1e-14, atol=0)


# --------------------------------------------------------------------------------------- decompositions that fail


def failing(*args: Any, **kwargs: Any) -> Any:
    raise torch.linalg.LinAlgError("no convergence")


def never_definite(S: Tensor) -> Any:
    return torch.return_types.linalg_cholesky_ex((S, torch.ones(S.shape[:-2], dtype=torch.int32)))


def without_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", never_definite)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "cholesky", "wide", "wide cholesky"])
def test_a_layer_keeps_its_last_good_inverse(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.05, factor_interval=1, inverse_interval=1, **KINDS[kind])
    data = batches(4)
    train(model, optimizer, data[:1])
    inverses = snapshot(optimizer.state_dict()["kfac"]["inverses"])
    before = weights(model)
    with monkeypatch.context() as patch:
        without_decompositions(patch)
        train(model, optimizer, data[1:2])
    now = optimizer.state_dict()["kfac"]["inverses"]
    moving = ("S", "weight", "scale") if kind == "ekfac" else ()  # second moments go on in the old bases
    for name, inverse in inverses.items():
        assert same(
            {k: v for k, v in inverse.items() if k not in moving}, {k: now[name][k] for k in inverse if k not in moving}
        )
    assert optimizer.report().events["kept"] == 3
    assert finite(model)
    assert not any(torch.equal(w, before[name]) for name, w in weights(model).items())
    train(model, optimizer, data[2:])
    assert optimizer.report().events["kept"] == 3
    assert not same(optimizer.state_dict()["kfac"]["inverses"], now)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_without_any_inverse_the_gradient_is_divided_by_the_damping(
    inverse: str, relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, momentum=0.0, damping=Damping(0.5, relative, inverse), factor_interval=1, clip=None)
    before = weights(model)
    data = batches(3)
    with monkeypatch.context() as patch:
        without_decompositions(patch)
        train(model, optimizer, data[:1])
    assert optimizer.report().events["identity"] == 3
    for name in ("0.weight", "6.bias"):
        layer = name[0]
        statistics = optimizer.preconditioner.statistics[layer]
        A, B = statistics.A[0], statistics.B[0]
        scale = A.square().sum() / A.trace() * B.square().sum() / B.trace() if relative else 1.0
        gradient = model.get_parameter(name).grad
        torch.testing.assert_close(
            before[name] - weights(model)[name], 0.1 * gradient / (0.5 * scale), rtol=1e-9, atol=1e-12
        )
    train(model, optimizer, data[1:])
    assert {inverse["kind"] for inverse in optimizer.state_dict()["kfac"]["inverses"].values()} == {inverse}
