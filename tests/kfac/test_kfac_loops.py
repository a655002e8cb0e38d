"""KFAC in the training loops that torch's optimisers meet: schedulers, closures, orders of calls, skipped steps, copies."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kfac_training import batches, convnet, same, train, weights
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.kfac import KFAC, Options

# --------------------------------------------------------------------------------------------- schedulers and closures


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.3),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=8),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.5**t]),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o, [torch.optim.lr_scheduler.LinearLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)], [3]
        ),
    ],
    ids=["StepLR", "OneCycleLR", "LambdaLR", "CosineAnnealingLR", "SequentialLR"],
)
def test_schedulers_set_what_the_steps_use(schedule: Callable[[torch.optim.Optimizer], Any]) -> None:
    options = Options(groups={"6.*": {"lr": 0.05}})
    scheduled, by_hand = convnet(), convnet()
    optimizer = KFAC(scheduled, 0.1, options=options)
    sgd = torch.optim.SGD(
        [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.1, 0.05)], momentum=0.9
    )
    other = KFAC(by_hand, 0.1, options=options)
    ours, theirs = schedule(optimizer), schedule(sgd)
    rates = []
    for batch in batches(6):
        train(scheduled, optimizer, [batch])
        for group, wanted in zip(other.param_groups, sgd.param_groups, strict=True):
            group.update(lr=wanted["lr"], momentum=wanted["momentum"])
        rates.append([group["lr"] for group in optimizer.param_groups])
        train(by_hand, other, [batch])
        sgd.step()
        ours.step()
        theirs.step()
    assert len({tuple(pair) for pair in rates}) > 2
    assert same(weights(scheduled), weights(by_hand))


def test_closure() -> None:
    plain, closed = convnet(), convnet()
    data = batches(3)
    losses = train(plain, KFAC(plain, 0.1), data)
    optimizer = KFAC(closed, 0.1)
    for (x, y), loss in zip(data, losses, strict=True):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            logits = closed(x)
            optimizer.update_curvature(logits)
            value = F.cross_entropy(logits, y)
            value.backward()
            return value

        with torch.no_grad():
            assert optimizer.step(closure).item() == loss
    assert same(weights(plain), weights(closed))


# ---------------------------------------------------------------------------------------------- orders and loops


def clear_first(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    logits = model(x)
    optimizer.update_curvature(logits)
    F.cross_entropy(logits, y).backward()


def clear_before_backward(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    logits = model(x)
    optimizer.update_curvature(logits)
    loss = F.cross_entropy(logits, y)
    optimizer.zero_grad()
    loss.backward()


def clear_after_forward(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    logits = model(x)
    optimizer.zero_grad(set_to_none=False)
    optimizer.update_curvature(logits)
    F.cross_entropy(logits, y).backward()


def clear_by_the_model(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    logits = model(x)
    loss = F.cross_entropy(logits, y)
    optimizer.update_curvature(logits)
    model.zero_grad()
    loss.backward()


def look_at_other_data_first(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor) -> None:
    model(x + 1)
    with torch.no_grad():
        model(x + 2)
    clear_first(optimizer, model, x, y)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
@pytest.mark.parametrize(
    "order", [clear_before_backward, clear_after_forward, clear_by_the_model, look_at_other_data_first]
)
def test_order_of_the_loop_does_not_matter(order: Callable[..., None], fisher: str) -> None:
    usual, other = convnet(), convnet()
    for model, body in ((usual, clear_first), (other, order)):
        optimizer = KFAC(model, 0.1, fisher=fisher, factor_interval=2)
        for x, y in batches(6):
            body(optimizer, model, x, y)
            optimizer.step()
        assert not optimizer.preconditioner.events
    assert same(weights(usual), weights(other))


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("skipped", [0, 3])
def test_a_step_that_is_left_out_leaves_nothing(skipped: int, fisher: str) -> None:
    data = batches(6)
    usual, other = convnet(), convnet()
    train(usual, KFAC(usual, 0.1, fisher=fisher), data)
    optimizer = KFAC(other, 0.1, fisher=fisher)
    for i, (x, y) in enumerate(data):
        if i == skipped:
            clear_first(optimizer, other, x.flip(0) * 3, y)
        clear_first(optimizer, other, x, y)
        optimizer.step()
    assert same(weights(usual), weights(other))


def test_copies_and_pickles_of_the_model_between_and_within_steps() -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, fisher="empirical")
    [(x, y), *rest] = batches(4)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    copied = copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    F.cross_entropy(copied(x), y).backward()  # leaves no trace
    loss.backward()
    optimizer.step()
    alone = convnet()
    other = KFAC(alone, 0.1, fisher="empirical")
    train(alone, other, [(x, y)])
    assert same(weights(model), weights(alone))
    train(model, optimizer, rest)
    train(alone, other, rest)
    assert same(optimizer.state_dict(), other.state_dict())


def test_torch_step_hooks_and_repr() -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    train(model, optimizer, batches(1))
    assert called == ["before", "after"]
    assert "damping: 0.01" in repr(optimizer)
