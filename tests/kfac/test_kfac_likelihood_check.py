"""The first step notices a loss that is not the declared likelihood, and no other."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import KFAC, Fisher, Options

LABELS = torch.arange(16) % 5
BINARY = (torch.arange(80).view(16, 5) % 3 == 0).float()
SOFT = torch.rand(16, 5, generator=torch.Generator().manual_seed(1))
REAL = torch.randn(16, 5, generator=torch.Generator().manual_seed(2))
BCE, MSE = Fisher(likelihood="bce"), Fisher(likelihood="mse")


def taken(
    loss: Callable[[Tensor], Tensor],
    fisher: Fisher = Fisher(),  # noqa: B008
    last: nn.Module | None = None,
    shape: tuple[int, ...] = (16, 7),
    dtype: torch.dtype | None = None,
    **options: bool,
) -> None:
    """One step of a network with 5 outputs and perhaps a last layer of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5), last or nn.Identity())
    optimizer = KFAC(model, fisher=fisher, options=Options(**options))
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = model(torch.randn(shape))
    optimizer.update_curvature(outputs)
    loss(outputs).backward()
    optimizer.step()


def weighted(z: Tensor) -> Tensor:
    return F.cross_entropy(z, LABELS, weight=torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=z.dtype))


RIGHT: dict[str, Callable[[Tensor], Tensor]] = {
    "hard labels": lambda z: F.cross_entropy(z, LABELS),
    "smoothed": lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1),
    "soft": lambda z: F.cross_entropy(z, torch.full((16, 5), 0.2)),
    "weighted": weighted,
    "ignored": lambda z: F.cross_entropy(z, LABELS.where(LABELS > 1, -100)),
    "distilled": lambda z: F.kl_div(z.log_softmax(1), torch.full((16, 5), 0.2), reduction="batchmean"),
    "sure of every label": lambda z: F.cross_entropy(z + 40.0 * F.one_hot(LABELS, 5), LABELS),
    "nearly sure": lambda z: F.cross_entropy(z + 15.0 * F.one_hot(LABELS, 5), LABELS),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_silent_on_every_cross_entropy(name: str, dtype: torch.dtype | None) -> None:
    taken(RIGHT[name], dtype=dtype)


def test_silent_on_a_sum_and_on_positions() -> None:
    taken(lambda z: F.cross_entropy(z, LABELS, reduction="sum"), Fisher(reduction="sum"))
    torch.manual_seed(0)
    model = nn.Conv2d(2, 5, 3)
    optimizer = KFAC(model)
    logits = model(torch.randn(4, 2, 6, 6))
    optimizer.update_curvature(logits)
    F.cross_entropy(logits, torch.randint(5, (4, 4, 4))).backward()
    optimizer.step()


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module | None]] = {
    "squared error": (lambda z: F.mse_loss(z, torch.ones_like(z)), None),
    "binary": (lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)), None),
    "log-probabilities": (lambda z: F.nll_loss(z, LABELS), nn.LogSoftmax(1)),
    "a penalty of the logits": (lambda z: F.cross_entropy(z, LABELS) + z.square().mean(), None),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_another_loss_is_refused(name: str, dtype: torch.dtype | None) -> None:
    loss, last = WRONG[name]
    with pytest.raises(
        InputError, match=r"does not sum to zero over dim 1, .*likelihood='mse'.*Options\(check=False\)"
    ):
        taken(loss, last=last, dtype=dtype)
    taken(loss, last=last, check=False)


def test_classes_in_the_last_dimension() -> None:
    labels = LABELS.reshape(4, 4)
    with pytest.raises(
        InputError, match=r"outputs \[4, 4, 5\] have their classes in the last .*pass logits.flatten\(0, 1\) to update"
    ):
        taken(lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten()), shape=(4, 4, 7))
    with pytest.raises(InputError, match=r"pass logits.flatten\(0, 2\)"):
        taken(lambda z: F.cross_entropy(z.flatten(0, 2), labels.flatten()), shape=(4, 2, 2, 7))


@pytest.mark.parametrize("shape", [(16,), (16, 1)])
def test_one_output_is_no_cross_entropy(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"logits of shape .*use Fisher\(likelihood='bce'\) or 'mse'"):
        taken(
            lambda z: F.mse_loss(z, torch.ones(shape)), last=nn.Sequential(nn.Linear(5, 1), nn.Flatten(len(shape) - 1))
        )


def bce(z: Tensor, y: Tensor = BINARY, **options: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y, **options)  # type: ignore[arg-type]


def over_mask(z: Tensor, y: Tensor) -> Tensor:
    mask = SOFT > 0.6
    return (F.binary_cross_entropy_with_logits(z, y, reduction="none") * mask).sum() / mask.sum()


def focal(z: Tensor) -> Tensor:
    p = z.sigmoid()
    weight = torch.where(BINARY > 0, 0.25 * (1 - p).square(), 0.75 * p.square())
    return (weight * F.binary_cross_entropy_with_logits(z, BINARY, reduction="none")).mean()


RIGHT_OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], Fisher]] = {
    "labels": (bce, BCE),
    "soft labels": (lambda z: bce(z, SOFT), BCE),
    "smoothed labels": (lambda z: bce(z, BINARY * 0.9 + 0.05), BCE),
    "weight of positive labels": (lambda z: bce(z, pos_weight=torch.tensor(7.0)), BCE),
    "weights of positive labels": (lambda z: bce(z, pos_weight=torch.tensor([2.0, 7.0, 0.5, 1.0, 20.0])), BCE),
    "weights of classes": (lambda z: bce(z, weight=torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])), BCE),
    "weights of samples": (lambda z: bce(z, weight=torch.linspace(0.1, 3, 16)[:, None]), BCE),
    "weights of elements": (lambda z: bce(z, weight=0.5 + 3 * SOFT), BCE),
    "mean over a mask": (lambda z: over_mask(z, BINARY), BCE),
    "mean over a mask, soft": (lambda z: over_mask(z, REAL.sigmoid()), BCE),
    "focal": (focal, BCE),
    "sure": (lambda z: bce(z + 40 * (2 * BINARY - 1)), BCE),
    "sum": (lambda z: bce(z) * z.numel(), Fisher(likelihood="bce", reduction="sum")),
    "real targets": (lambda z: F.mse_loss(z, REAL), MSE),
    "labels as targets": (lambda z: F.mse_loss(z, BINARY), MSE),
    "half": (lambda z: 0.5 * F.mse_loss(z, 2 * BINARY - 1), MSE),
    "hardly any outputs": (lambda z: F.mse_loss(1e-3 * z, 2 * BINARY - 1), MSE),
    "Huber": (lambda z: F.huber_loss(z, 3 * REAL), MSE),
}


@pytest.mark.parametrize("name", RIGHT_OTHERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_silent_on_every_bernoulli_and_squared_error(name: str, dtype: torch.dtype | None) -> None:
    loss, fisher = RIGHT_OTHERS[name]
    taken(lambda z: loss(z.float()), fisher, dtype=dtype)


def test_silent_on_probabilities_with_a_squared_error() -> None:
    taken(lambda z: F.mse_loss(z, F.one_hot(LABELS, 5).float()), MSE, nn.Softmax(1))
    taken(lambda z: F.mse_loss(z, SOFT), MSE, nn.Sigmoid())


WRONG_OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], Fisher]] = {
    "huge targets": (lambda z: F.mse_loss(z, 1e4 * REAL), BCE),
    "targets in [0, 1]": (lambda z: F.mse_loss(z, SOFT), BCE),
    "one target": (lambda z: F.mse_loss(z, torch.ones_like(z)), BCE),
    "labels as targets": (lambda z: F.mse_loss(z, BINARY), BCE),
    "classes": (lambda z: F.cross_entropy(z, LABELS), BCE),
    "soft classes": (lambda z: F.cross_entropy(z, REAL.softmax(1)), BCE),
    "classes and squared error": (lambda z: F.cross_entropy(z, LABELS), MSE),
    "smoothed classes": (lambda z: F.cross_entropy(z, LABELS, label_smoothing=0.1), MSE),
    "labels and squared error": (bce, MSE),
    "smoothed labels": (lambda z: bce(z, BINARY * 0.9 + 0.05), MSE),
}


def smoothed(z: Tensor, weight: Tensor) -> Tensor:
    return bce(z, BINARY * 0.9 + 0.05, pos_weight=weight)


def per_sample(z: Tensor, scale: float = 1.0) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, SOFT, reduction="none").sum(1).mean() * scale


def z_loss(z: Tensor) -> Tensor:
    return F.cross_entropy(z, LABELS) + 1e-3 * z.logsumexp(1).square().mean()


DOUBTFUL: dict[str, tuple[Callable[[Tensor], Tensor], Fisher]] = {
    "soft labels, a sum over outputs": (per_sample, BCE),
    "soft labels, a sum": (lambda z: bce(z, SOFT) * z.numel(), BCE),
    "soft labels times 10": (lambda z: 10 * bce(z, SOFT), BCE),
    "soft labels, weights of samples": (lambda z: bce(z, SOFT, weight=torch.linspace(0.01, 3, 16)[:, None]), BCE),
    "smoothed, weights of positive labels": (lambda z: smoothed(z, torch.linspace(1, 40, 5)), BCE),
    "a penalty of the logits": (lambda z: per_sample(z) + 1e-3 * z.square().sum(), BCE),
    "real targets of a squared error": (lambda z: F.mse_loss(z, REAL), BCE),
    "z-loss": (z_loss, Fisher()),
}
"""What the gradient cannot tell from the declared likelihood with weights, a factor or a further term."""


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_doubt_is_a_warning_and_no_error(name: str) -> None:
    loss, fisher = DOUBTFUL[name]
    with pytest.warns(
        UserWarning, match=r"the loss's gradient at the outputs .*for another loss pass Fisher\("
    ) as caught:
        taken(loss, fisher)
    assert len(caught) == 1
    taken(loss, fisher, check=False)


def test_a_doubt_about_one_output_names_no_factor() -> None:
    last = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
    weight = torch.linspace(0.1, 40, 16)
    with pytest.warns(UserWarning, match=r"up to .* make it so; for another loss") as caught:
        taken(lambda z: F.binary_cross_entropy_with_logits(z, SOFT[:, 0], weight=weight), BCE, last)
    assert len(caught) == 1


def test_a_doubt_about_several_batches_is_one_warning_and_a_declared_factor_none() -> None:
    model = nn.Linear(7, 5)
    optimizer = KFAC(model, fisher=BCE)

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                outputs = model(torch.randn(16, 7))
                optimizer.update_curvature(outputs)
                per_sample(outputs, 0.5).backward()
            optimizer.step()

    with pytest.warns(UserWarning, match="for a sum over outputs, mean over samples") as caught:
        train()
    assert len(caught) == 1
    taken(per_sample, Fisher(likelihood="bce", weights=5))


@pytest.mark.parametrize("name", WRONG_OTHERS)
def test_another_loss_than_the_declared_one_is_refused(name: str) -> None:
    loss, fisher = WRONG_OTHERS[name]
    with pytest.raises(InputError, match=r"pass (fisher=)?Fisher\(likelihood='.*Options\(check=False\) accepts"):
        taken(loss, fisher)
    taken(loss, fisher, check=False)


@pytest.mark.parametrize(
    ("last", "loss", "fisher"),
    [
        (nn.Sigmoid(), lambda p: F.binary_cross_entropy(p, BINARY), BCE),
        (nn.Sigmoid(), lambda p: F.binary_cross_entropy(p, BINARY), Fisher()),
        (nn.Sigmoid(), bce, BCE),
        (nn.Sequential(nn.Sigmoid(), nn.Flatten()), bce, BCE),
        (nn.Softmax(1), lambda p: F.nll_loss(p.log(), LABELS), Fisher()),
        (nn.Softmax(1), lambda p: F.cross_entropy(p, LABELS), Fisher()),
    ],
)
def test_probabilities_are_no_logits(last: nn.Module, loss: Callable[[Tensor], Tensor], fisher: Fisher) -> None:
    with pytest.raises(InputError, match=r"the outputs are probabilities, made by a s.*likelihood='.*takes logits"):
        taken(loss, fisher, last)
    taken(loss, fisher, last, check=False)


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("name", ["hard labels", "labels"])
def test_a_constant_factor_warns_once(name: str, factor: float) -> None:
    loss, likelihood = (RIGHT[name], "cross_entropy") if name in RIGHT else (bce, "bce")
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    optimizer = KFAC(model, fisher=Fisher(likelihood=likelihood))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            outputs = model(torch.randn(16, 7))
            optimizer.zero_grad()
            optimizer.update_curvature(outputs)
            (factor * loss(outputs)).backward()
            optimizer.step()
    [message] = [str(one.message) for one in caught]
    assert f"is {factor:g} times that of {likelihood} with reduction 'mean'" in message
    assert f"Fisher(weights={factor:g})" in message
    taken(lambda z: factor * loss(z), Fisher(likelihood=likelihood, weights=factor))  # silent


def test_a_constant_factor_of_accumulated_batches() -> None:
    def accumulated(*factors: float) -> None:
        torch.manual_seed(0)
        model = nn.Linear(7, 5)
        optimizer = KFAC(model)
        for factor, labels in zip(factors, LABELS.chunk(len(factors)), strict=True):
            logits = model(torch.randn(len(labels), 7))
            optimizer.update_curvature(logits)
            (factor * F.cross_entropy(logits, labels)).backward()
        optimizer.step()

    accumulated(0.25, 0.25, 0.25, 0.25)
    with pytest.warns(UserWarning, match="is 0.5 times that of cross_entropy"):
        accumulated(0.125, 0.125, 0.125, 0.125)
    for factors in ([1.0, 1.0, 1.0, 1.0], [0.25, 0.25, 0.25, 0.5]):
        with pytest.raises(InputError, match="divide the loss of each of the 4 accumulated batches by 4"):
            accumulated(*factors)


@pytest.mark.parametrize("rule", ["adam", "natural", "natural_fixed", "adam_free", "natural_adam"])
def test_what_a_constant_factor_does_to_the_steps(rule: str) -> None:
    """Nothing where lengths do not depend on the gradient's; natural steps are longer by it."""

    def trained(factor: float) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5)).double()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        optimizer = KFAC(model, step_rule=rule, clip=None, options=Options(check=False))
        for _ in range(1 if rule == "natural" else 5):
            outputs = model(torch.randn(16, 7).double())
            optimizer.zero_grad()
            optimizer.update_curvature(outputs)
            (factor * F.cross_entropy(outputs, LABELS)).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    length = 4.0 if rule == "natural" else 1.0
    torch.testing.assert_close(trained(4.0), length * trained(1.0), rtol=1e-8, atol=1e-12)
