"""Autocast, GradScaler and gradient accumulation: factors are those of the loss, whatever its scale, precision or pieces."""

import re
from typing import Any

import pytest
import torch
from kfac_training import KINDS, batches, convnet, difference, same, snapshot, train, weights
from natural import KFAC
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import Fisher, Options


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------------------ autocast


def low_precision(outside: bool, **settings: Any) -> tuple[nn.Module, KFAC, list[float]]:
    """Float32 weights, forward in bfloat16; `outside`: everything but the forward pass out of the autocast block."""
    model = convnet().float()
    optimizer = KFAC(model, 0.03, **settings)
    losses = []
    for x, y in batches(3, 32) * 6:
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.zero_grad()
            logits = model(x.float())
            assert logits.dtype == torch.bfloat16
            with torch.autocast("cpu", torch.bfloat16, enabled=not outside):
                optimizer.update_curvature(logits)
                loss = F.cross_entropy(logits.float(), y)
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "cholesky", "wide", "exact", "empirical", "empirical ekfac", "clip"])
def test_autocast_reaches_the_model_only(kind: str) -> None:
    """Nothing of K-FAC's own depends on whether its calls are inside the block, and the factors are good to bfloat16."""
    inside, optimizer, losses = low_precision(False, **KINDS[kind])
    outside, _, _ = low_precision(True, **KINDS[kind])
    assert same(weights(inside), weights(outside))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    for state in optimizer.state_dict()["kfac"]["statistics"].values():
        assert {v.dtype for v in state.values() if isinstance(v, Tensor)} == {torch.float32}
    assert not optimizer.preconditioner.events


def test_factors_under_autocast_are_those_of_full_precision() -> None:
    factors = []
    for enabled in (False, True):
        model = convnet().float()
        optimizer = KFAC(model, 0.1, fisher="exact")
        x, y = batches(1, 64)[0]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(x.float())
        optimizer.update_curvature(logits)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        factors.append([(s.A, s.B) for s in optimizer.preconditioner.statistics.values()])
    for (A, B), (low_A, low_B) in zip(*factors, strict=True):
        assert relative(low_A, A) < 2e-2
        assert 0 < relative(low_B, B) < 2e-2


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_model_in_bfloat16_keeps_its_factors_in_float32(fisher: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    before = weights(model)
    optimizer = KFAC(model, 0.05, fisher=fisher)
    x = torch.randn(32, 6).bfloat16()
    train(model, optimizer, [(x, x[:, :3].argmax(1))] * 5)
    assert {s.B.dtype for s in optimizer.preconditioner.statistics.values() if s.B is not None} == {torch.float32}
    assert all(w.isfinite().all() and not torch.equal(w, before[name]) for name, w in weights(model).items())


# ---------------------------------------------------------------------------------------------------------- GradScaler


def scaled_training(
    model: nn.Module,
    optimizer: KFAC,
    scaler: torch.amp.GradScaler,
    bad: tuple[int, ...] = (),
    clip: float | None = None,
) -> None:
    """As in torch's documentation; the batches in `bad` come once with a loss that overflows before they come as they are."""
    for i, (x, y) in enumerate(batches(8)):
        for overflow in [True, False] if i in bad else [False]:
            optimizer.zero_grad()
            logits = model(x)
            optimizer.update_curvature(logits)
            loss = F.cross_entropy(logits, y)
            scaler.scale(loss * float("inf") if overflow else loss).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            before = snapshot(optimizer.preconditioner.state_dict())
            moved = weights(model)
            scaler.step(optimizer)
            if overflow:
                assert same(weights(model), moved)
                assert same(optimizer.preconditioner.state_dict(), before)
            scaler.update()


@pytest.mark.parametrize("bad", [(), (0,), (0, 1, 5)])
@pytest.mark.parametrize("kind", ["exact", "empirical", "empirical ekfac"])
def test_scaled_losses_train_as_unscaled_ones(kind: str, bad: tuple[int, ...]) -> None:
    """Scales are powers of two: bit for bit, also after steps that the scaler skips."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    settings = dict(KINDS[kind])
    fisher = Fisher(settings.pop("fisher"), grad_scaler=scaler)
    model, plain = convnet(), convnet()
    optimizer = KFAC(model, 0.05, fisher=fisher, factor_interval=2, **settings)
    scaled_training(model, optimizer, scaler, bad)
    train(plain, KFAC(plain, 0.05, factor_interval=2, **KINDS[kind]), batches(8))
    assert same(weights(model), weights(plain))
    assert not optimizer.preconditioner.events


def test_sampled_labels_do_not_need_to_know_the_scaler() -> None:
    for clip in (None, 0.1):
        trained = []
        for known in (False, True):
            scaler = torch.amp.GradScaler("cpu")
            model = convnet()
            optimizer = KFAC(model, 0.05, fisher=Fisher(grad_scaler=scaler if known else None))
            scaled_training(model, optimizer, scaler, bad=(0, 3), clip=clip)
            assert optimizer.preconditioner.gathering.check is None
            trained.append(weights(model))
        assert same(*trained)


def test_given_labels_do_need_to_know_it() -> None:
    scaler = torch.amp.GradScaler("cpu")
    model = convnet()
    before = weights(model)
    message = (
        "the gradients were divided by 65536 between backward() and step(), which fisher='empirical' has to know: pass"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        scaled_training(model, KFAC(model, 0.05, fisher="empirical"), scaler)
    assert same(weights(model), before)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_clipping_and_disabled_scalers_are_fine(fisher: str) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model = convnet()
    optimizer = KFAC(model, 0.05, fisher=Fisher(fisher, grad_scaler=scaler))
    scaled_training(model, optimizer, scaler, clip=0.1)
    assert optimizer.preconditioner.gathering.check is None


def test_a_loss_of_the_other_reduction_is_still_noticed() -> None:
    for factor, reduction in ((12, "mean"), (1, "sum")):
        model = convnet()
        optimizer = KFAC(model, 0.05, fisher=Fisher(reduction=reduction))
        x, y = batches(1)[0]
        logits = model(x)
        optimizer.update_curvature(logits)
        (F.cross_entropy(logits, y) * factor).backward()
        with pytest.raises(
            InputError, match=f"is {0.08333 if reduction == 'sum' else factor} times that of cross_entropy"
        ):
            optimizer.step()


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["exact", "empirical", "empirical ekfac", "wide", "reduce"])
def test_accumulated_gradients_are_those_of_one_batch(kind: str, reduction: str) -> None:
    """Batches that leave A no null space of more dimensions than one: its basis would be that of rounding, and EKFAC's S, too."""
    settings = {"factor_interval": 2, "clip": 10.0, **KINDS[kind]}
    settings["fisher"] = Fisher(settings.get("fisher", "exact"), reduction=reduction)
    whole, pieces = convnet(), convnet()
    train(whole, KFAC(whole, 0.05, **settings), batches(6, 48), reduction)
    optimizer = KFAC(pieces, 0.05, **settings)
    for x, y in batches(6, 48):
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(3), y.chunk(3), strict=True):
            logits = pieces(part)
            optimizer.update_curvature(logits)
            loss = F.cross_entropy(logits, labels, reduction=reduction)
            (loss / 3 if reduction == "mean" else loss).backward()
        optimizer.step()
    assert difference(pieces, whole) < 1e-10
    assert not optimizer.preconditioner.events


def test_pieces_of_unequal_sizes_with_sums() -> None:
    whole, pieces = convnet(), convnet()
    fisher = Fisher("empirical", reduction="sum")
    train(whole, KFAC(whole, 0.05, fisher=fisher), batches(3), "sum")
    optimizer = KFAC(pieces, 0.05, fisher=fisher)
    for x, y in batches(3):
        optimizer.zero_grad()
        for part, labels in zip(x.split([7, 4, 1]), y.split([7, 4, 1]), strict=True):
            F.cross_entropy(pieces(part), labels, reduction="sum").backward()
        optimizer.step()
    assert difference(pieces, whole) < 1e-10


def test_losses_that_are_not_divided_are_noticed() -> None:
    model = convnet()
    optimizer = KFAC(model, 0.05)
    x, y = batches(1)[0]
    for part, labels in zip(x.chunk(3), y.chunk(3), strict=True):
        logits = model(part)
        optimizer.update_curvature(logits)
        F.cross_entropy(logits, labels).backward()
    with pytest.raises(InputError, match="divide the loss of each of the 3 accumulated batches by 3"):
        optimizer.step()


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_accumulation_holds_the_activations_of_one_piece(fisher: str) -> None:
    model = convnet()
    optimizer = KFAC(model, 0.05, fisher=fisher, options=Options(check=False))
    x, y = batches(1)[0]
    for part, labels in zip(x.chunk(3), y.chunk(3), strict=True):
        logits = model(part)
        optimizer.update_curvature(logits)
        (F.cross_entropy(logits, labels) / 3).backward()
        assert not optimizer.preconditioner.gathering.capture._recorded
