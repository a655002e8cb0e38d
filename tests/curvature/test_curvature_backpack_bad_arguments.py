"""Losses, labels and options of BackPACK's extensions that are refused in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backpack import extensions
from backpack.extensions.backprop_extension import BackpropExtension
from labelled_losses import CASES, F64, D, N, drawn, segmentation
from torch import Tensor, nn

from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.curvature.backpack.twins import TWINS, children
from secondorder.errors import InputError


def problem() -> tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, Tensor]]:
    """A segmentation."""
    loss, labels = CASES["classes"]
    return segmentation(), loss, (drawn(N, 2, *D, seed=7), labels)


def with_options(loss: nn.Module, **options: Any) -> nn.Module:
    """The loss with options that its constructor does not look at either."""
    vars(loss).update(options)
    return loss


def hooked() -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, value: 2 * value)
    return loss


class Doubled(nn.CrossEntropyLoss):
    """A loss of the user's own."""

    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return 2 * super().forward(outputs, labels)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss, r"loss CrossEntropyLoss is a class; pass an instance: CrossEntropyLoss\(\)"),
        (hooked(), "must be cross-entropy.* without a forward or hooks of its own"),
        (Doubled(), r"Doubled\(\): must be .* without a forward or hooks of its own"),
        (nn.CrossEntropyLoss(nn.Parameter(torch.ones(3, dtype=F64))), "weights that require gradients"),
        (
            with_options(nn.CrossEntropyLoss(), label_smoothing=2.0),
            r"label_smoothing must be a number in \[0, 1\], got 2",
        ),
        (with_options(nn.CrossEntropyLoss(), label_smoothing=-0.5), r"label_smoothing must be .*, got -0\.5"),
    ],
)
def test_losses_that_are_refused(loss: Any, message: str) -> None:
    network, _, batch = problem()
    with pytest.raises(InputError, match=message):
        backpack_quantity(network, loss, batch, extensions.DiagGGNExact())


def test_labels_that_are_refused() -> None:
    network, loss, (images, labels) = problem()
    with pytest.raises(
        InputError, match=r"labels of shape \[4, 2, 2\] \(torch.int32\) .* needs class indices \[4, 2, 2\]"
    ):
        backpack_quantity(network, loss, (images, labels.int()), extensions.BatchGrad())
    network = nn.Sequential(nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match=r"class probabilities of shape \[2\].*; class indices are torch.int64"):
        backpack_quantity(network, loss, (drawn(2, 4), torch.ones(2)), extensions.BatchGrad())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_networks_without_outputs() -> None:
    network = nn.Sequential(nn.Linear(4, 0)).double()
    with pytest.raises(InputError, match=r"returns shape \[1, 0\] for one image"):
        backpack_quantity(network, nn.MSELoss(), (drawn(2, 4), drawn(2, 0)), extensions.BatchGrad())


@pytest.mark.parametrize("samples", [0, -1, 1.5, True, None])
@pytest.mark.parametrize("extension", [extensions.DiagGGNMC, extensions.SqrtGGNMC, extensions.KFAC])
def test_numbers_of_monte_carlo_samples(extension: Callable[..., BackpropExtension], samples: Any) -> None:
    """None are no curvature, and were an estimate of zero."""
    network, loss, batch = problem()
    with pytest.raises(InputError, match=f"mc_samples must be a whole number of at least 1, got {samples}"):
        backpack_quantity(network, loss, batch, extension(mc_samples=samples))


@pytest.mark.parametrize("chosen", [[], [4], [-5], [1.5], [True, False, True, True], (0, 1), 2, "ab", torch.tensor(1)])
@pytest.mark.parametrize("extension", [extensions.SqrtGGNExact, extensions.BatchGrad])
def test_samples_that_are_none(extension: Callable[..., BackpropExtension], chosen: Any) -> None:
    """A mask was taken for the numbers 1, 0, 1, 1, and pairs for an index of samples and channels."""
    network, loss, batch = problem()
    with pytest.raises(InputError, match=r"subsampling .*: must be a list of whole numbers in 0, ..., 3, samples of"):
        backpack_quantity(network, loss, batch, extension(subsampling=chosen))


class Flat(nn.Sequential):
    """Layers that return all outputs of an image side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


@pytest.mark.parametrize("more", [[], [nn.Dropout(0.5)]])
def test_a_twin_with_outputs_of_another_shape(more: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TWINS, Flat, children)
    network, targets = Flat(nn.Conv2d(2, 3, 1), *more).double(), drawn(N, 12)
    with pytest.raises(InputError, match="twin of this Flat gives other outputs; check the rows of TWINS"):
        backpack_quantity(network, nn.MSELoss(), (drawn(N, 2, *D), targets), extensions.BatchGrad())
