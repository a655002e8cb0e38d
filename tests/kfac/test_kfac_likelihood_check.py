"""The first step notices a loss that is not the declared likelihood, and no other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import KFAC, Fisher, Options

LABELS = torch.arange(16) % 5


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
        InputError, match=r"outputs \[4, 4, 5\] have their classes in the last .*logits.flatten\(0, 1\)"
    ):
        taken(lambda z: F.cross_entropy(z.flatten(0, 1), labels.flatten()), shape=(4, 4, 7))


def test_the_declared_likelihood_of_another_loss_is_fine() -> None:
    taken(lambda z: F.mse_loss(z, torch.ones_like(z)), Fisher(likelihood="mse"))
    taken(lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)), Fisher(likelihood="bce"))
