"""KFAC in the training loops that torch's optimisers meet: schedulers, closures, orders of calls, skipped steps, copies."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kfac_training import batches, convnet, same, train, weights
from natural import KFAC
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import Fisher, Options

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


# ------------------------------------------------------------------------------- other optimisers, heads, bad outputs


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_nothing_is_left_of_a_deleted_optimizer(fisher: str) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, fisher=fisher)
    model(batches(1)[0][0])
    capture = weakref.ref(optimizer.preconditioner.gathering.capture)
    check = weakref.ref(optimizer.preconditioner.gathering.check)
    del optimizer
    gc.collect()
    assert capture() is None
    assert check() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.a(h), self.b(h)


@pytest.mark.parametrize("batches_of", [[6], [4, 2]])
def test_outputs_of_several_heads_in_one_call(batches_of: list[int]) -> None:
    model = Heads().double()
    x, a, b = torch.randn(6, 4).double(), torch.randint(3, (6,)), torch.randint(2, (6,))
    optimizer = KFAC(model, 0.1, fisher="exact")
    weight_before = {name: getattr(model, name).weight.detach().clone() for name in "ab"}
    slope = 1 - torch.tanh(model.body(x)).square().detach()
    optimizer.zero_grad()
    outputs = [model(part) for part in x.split(batches_of)]
    optimizer.update_curvature([z for pair in outputs for z in pair])
    za, zb = (torch.cat(zs) for zs in zip(*outputs, strict=True))
    (F.cross_entropy(za, a) + F.cross_entropy(zb, b)).backward()
    optimizer.step()
    statistics = optimizer.preconditioner.statistics
    assert optimizer.preconditioner.gathering.samples == 6
    hidden = 0.0
    for name, z in (("a", za.detach()), ("b", zb.detach())):
        p = z.softmax(-1)
        H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        torch.testing.assert_close(statistics[name].B, H.mean(0)[None])
        J = weight_before[name] * slope[:, None]  # [N, K, 5]
        hidden = hidden + (J.mT @ H @ J).mean(0)
    torch.testing.assert_close(statistics["body"].B, hidden[None])


def test_drawn_gradients_of_heads_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Heads()
    optimizer = KFAC(model, 0.1)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: calls.append(1) or grad(*args, **kwargs))
    optimizer.update_curvature(model(torch.randn(6, 4)))
    assert len(calls) == 1


def test_two_calls_for_one_forward() -> None:
    model = Heads()
    optimizer = KFAC(model, 0.1)
    za, zb = model(torch.randn(6, 4))
    optimizer.update_curvature(za)
    with pytest.raises(InputError, match=r"all outputs in one call: update_curvature\(\[first, second\]\)"):
        optimizer.update_curvature(zb)


@pytest.mark.parametrize(
    ("bad", "message"), [(3.0, "float is not a tensor"), ([], "pass the model's logits"), ({"z": 1}, "dict is not")]
)
def test_what_is_not_an_output(bad: Any, message: str) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1)
    with pytest.raises(InputError, match=message):
        optimizer.update_curvature(bad)
    with pytest.raises(InputError, match="the loss"):
        optimizer.update_curvature(model(batches(1)[0][0]).sum())


def test_rows_of_a_plain_step() -> None:
    model = convnet()
    [(x, y)] = batches(1)
    optimizer = KFAC(model, 0.1, fisher=Fisher("mc", reduction="sum"), factor_interval=10)
    gathering = optimizer.preconditioner.gathering
    while gathering.due:
        optimizer.zero_grad()
        logits = model(x)
        optimizer.update_curvature(logits)
        F.cross_entropy(logits, y, reduction="sum").backward()
        optimizer.step()
    assert gathering.mean_scale == 1 / len(x)
    gathering.note_rows(model(x[:3]))
    gathering.note_rows(model(x[:2]))
    assert gathering.mean_scale == 1 / 5


def test_rows_of_an_empirical_step_are_those_of_the_output() -> None:
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 3), nn.Unflatten(0, (-1, 5)))
    optimizer = KFAC(model, 0.1, fisher="empirical")
    model(torch.randn(2, 5, 4)).square().mean().backward()
    optimizer.step()
    assert optimizer.preconditioner.gathering.samples == 2
