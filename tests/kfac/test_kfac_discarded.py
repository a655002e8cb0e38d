"""Backward passes whose gradients are cleared, by whomever, and forward passes that no `update_curvature` counted."""

from collections.abc import Callable

import pytest
import torch
from kfac_training import batches, convnet, same, snapshot, train, weights
from natural import KFAC
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import Fisher

DATA = batches(5)
OTHER = (3 * DATA[0][0].flip(0), DATA[0][1])
LABELS = ["mc", "exact", "empirical"]


def backward(optimizer: KFAC, model: nn.Module, x: Tensor, y: Tensor, share: float = 1.0) -> Tensor:
    logits = model(x)
    optimizer.update_curvature(logits)
    loss = share * F.cross_entropy(logits, y)
    loss.backward()
    return loss


def by_the_model(optimizer: KFAC, model: nn.Module) -> None:
    model.zero_grad()


def to_zero(optimizer: KFAC, model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def by_hand(optimizer: KFAC, model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


def by_the_optimizer(optimizer: KFAC, model: nn.Module) -> None:
    optimizer.zero_grad()


def end(model: nn.Module, optimizer: KFAC) -> list[object]:
    """The weights and all factors."""
    optimizer.step()
    state = optimizer.preconditioner.state_dict()
    return [weights(model), state["statistics"], state["samples"]]


@pytest.mark.parametrize("fisher", LABELS)
@pytest.mark.parametrize("clear", [by_the_model, to_zero, by_hand, by_the_optimizer])
@pytest.mark.parametrize("first", [True, False])
def test_a_discarded_backward_pass_does_not_count(first: bool, clear: Callable[..., None], fisher: str) -> None:
    found = []
    for passes in (0, 1, 3):
        model = convnet()
        optimizer = KFAC(model, 0.1, fisher=fisher, factor_interval=1)
        if not first:
            train(model, optimizer, DATA[:2])
        optimizer.zero_grad()
        generator = optimizer.preconditioner.gathering.generator.get_state()
        for _ in range(passes):
            backward(optimizer, model, *OTHER)
            clear(optimizer, model)
        optimizer.preconditioner.gathering.generator.set_state(generator)
        backward(optimizer, model, *DATA[2])
        found.append(end(model, optimizer))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


@pytest.mark.parametrize("fisher", LABELS)
def test_accumulated_passes_after_a_discarded_one_count(fisher: str) -> None:
    found = []
    for discarded in (False, True):
        model = convnet()
        optimizer = KFAC(model, 0.1, fisher=fisher)
        generator = optimizer.preconditioner.gathering.generator.get_state()
        if discarded:
            backward(optimizer, model, *OTHER)
            model.zero_grad(set_to_none=False)
        optimizer.preconditioner.gathering.generator.set_state(generator)
        for batch in DATA[:3]:
            backward(optimizer, model, *batch, 1 / 3)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # touches the gradients, and clears nothing
            for p in model.parameters():
                p.grad.mul_(1.0)
        found.append(end(model, optimizer))
        assert optimizer.preconditioner.gathering.samples == 36
    assert same(*found)


def test_gradients_of_the_weights_that_are_only_looked_at_do_not_count() -> None:
    found = []
    for looked in (False, True):
        model = convnet()
        optimizer = KFAC(model, 0.1, fisher="empirical")
        if looked:
            torch.autograd.grad(F.cross_entropy(model(OTHER[0]), OTHER[1]), list(model.parameters()))
        backward(optimizer, model, *DATA[0])
        found.append(end(model, optimizer))
    assert same(*found)


def test_gradients_that_are_put_in_place_by_hand_count() -> None:
    found = []
    for by_grad in (False, True):
        model = convnet()
        optimizer = KFAC(model, 0.1, fisher="empirical")
        for x, y in DATA[:2]:
            loss = F.cross_entropy(model(x), y) / 2
            if by_grad:
                for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                    p.grad = g if p.grad is None else p.grad + g
            else:
                loss.backward()
        found.append(end(model, optimizer))
    assert same(*found)


def test_a_part_that_is_cleared_has_the_factors_of_its_own_gradient() -> None:
    model, alone = convnet(), convnet()
    optimizer, other = KFAC(model, 0.1, fisher="empirical"), KFAC(alone, 0.1, fisher="empirical")
    train(model, optimizer, DATA[:1])
    train(alone, other, DATA[:1])
    optimizer.preconditioner.intervals.step = other.preconditioner.intervals.step = 10
    for own, net in ((optimizer, model), (other, alone)):
        own.preconditioner.gathering.begin(True, 10)
        own.zero_grad()
        backward(own, net, *OTHER)
        if net is model:
            model[0].zero_grad()
        else:
            own.zero_grad()
        backward(own, net, *DATA[1])
    staged = [own.preconditioner.statistics for own in (optimizer, other)]
    first, second = ([s["0"].staged_tensors() for s in staged], [s["6"].staged_tensors() for s in staged])
    assert same(*first)
    assert not same(*second)


# ------------------------------------------------------------------------------ forward passes that were not counted


@pytest.mark.parametrize("counted", [0, 1, 2])
@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_the_curvature_of_a_part_of_the_accumulated_batches(fisher: str, counted: int) -> None:
    found = []
    for all_batches in (True, False):
        model = convnet()
        optimizer = KFAC(model, 0.1, fisher=fisher)
        for i, (x, y) in enumerate(DATA[:3]):
            if all_batches and i != counted:
                continue  # the same factors, of this batch alone
            logits = model(x)
            if i == counted:
                optimizer.update_curvature(logits)
            (F.cross_entropy(logits, y) / (1 if all_batches else 3)).backward()
        optimizer.step()
        found.append(optimizer.preconditioner.state_dict())
        assert optimizer.preconditioner.gathering.samples == 12
    assert same(found[0]["statistics"], found[1]["statistics"])


@pytest.mark.parametrize("first", [True, False])
def test_summed_losses_need_the_curvature_of_all_batches(first: bool) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, fisher=Fisher("mc", reduction="sum"), factor_interval=1)
    if not first:
        train(model, optimizer, DATA[:2], "sum")
    optimizer.zero_grad()
    F.cross_entropy(model(OTHER[0]), OTHER[1], reduction="sum").backward()
    model.zero_grad()  # a batch that is not in the gradients need not be counted
    for (x, y), counted in zip(DATA[:2], (True, False), strict=True):
        images = x.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(model(images), y), images)  # nor one for an adversarial example
        logits = model(x)
        if counted:
            optimizer.update_curvature(logits)
        F.cross_entropy(logits, y, reduction="sum").backward()
        if counted:
            before = weights(model)
    with pytest.raises(InputError, match="not called for every forward pass whose gradients are accumulated"):
        optimizer.step()
    assert same(before, weights(model))
    optimizer.zero_grad()
    logits = model(DATA[0][0])
    optimizer.update_curvature(logits)
    F.cross_entropy(logits, DATA[0][1], reduction="sum").backward()
    optimizer.step()


@pytest.mark.parametrize("fisher", LABELS)
@pytest.mark.parametrize("when", ["after forward", "after update", "after backward"])
def test_a_state_loaded_within_a_step(when: str, fisher: str) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.1, fisher=fisher, factor_interval=1)
    train(model, optimizer, DATA[:2])
    state = snapshot(optimizer.state_dict())
    optimizer.zero_grad()
    before = weights(model)

    def step() -> None:
        for name in ("after forward", "after update", "after backward"):
            if name == "after forward":
                logits = model(DATA[2][0])
            elif name == "after update":
                optimizer.update_curvature(logits)
            else:
                F.cross_entropy(logits, DATA[2][1]).backward()
            if name == when:
                optimizer.load_state_dict(snapshot(state))
        optimizer.step()

    with pytest.raises(InputError, match="load_state_dict"):
        step()
    assert same(before, weights(model))
    optimizer.zero_grad()
    backward(optimizer, model, *DATA[2])
    ours = end(model, optimizer)
    other = convnet()
    other.load_state_dict(before)
    fresh = KFAC(other, 0.1, fisher=fisher, factor_interval=1)
    fresh.load_state_dict(state)
    backward(fresh, other, *DATA[2])
    assert same(ours, end(other, fresh))
