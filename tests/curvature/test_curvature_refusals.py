"""What BackPACK would silently get wrong is refused in one line that names the module, the quantity and the way out."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backpack import extend, extensions
from backpack.extensions.backprop_extension import BackpropExtension
from small_networks import CLASSES, batch, built, chain
from torch import Tensor, nn

from secondorder.curvature.backpack.conversion import backpack_network
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.errors import InputError, NonFiniteError


def network(*layers: nn.Module) -> nn.Sequential:
    """The layers between a convolution and a classifier, for images [N, 2, 6, 6]."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES)
    ).double()


def with_hook(kind: str) -> nn.Sequential:
    model = network(nn.ReLU())
    getattr(model[1], f"register_{kind}")(changed)
    return model


def changed(module: nn.Module, *args: Any) -> None:
    """A hook."""


def with_own_forward() -> nn.Sequential:
    model = network(nn.ReLU())
    model[1].forward = lambda x: x  # type: ignore[method-assign]
    return model


def refused(model: nn.Module, extension: BackpropExtension | None = None, **changes: Any) -> str:
    """The message with which a network is refused; one line."""
    loss = changes.pop("loss", nn.CrossEntropyLoss())
    data = changes.pop("data") if "data" in changes else batch(nn.CrossEntropyLoss(), 2)
    with pytest.raises(InputError) as error:
        backpack_quantity(model, loss, data, extension or extensions.DiagGGNExact(), **changes)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: network(nn.Conv2d(3, 3, 3, padding="same")),
            r"'1' \(Conv2d\) has padding='same', .*whole numbers, or use curv",
        ),
        (
            lambda: network(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"))),
            r"'1\.0' \(Conv2d\) has padding_mode='circular', .*padding_mode='zeros', or use curvature_blocks",
        ),
        (lambda: network(nn.BatchNorm2d(3)), r"'1' \(BatchNorm2d\) is in training mode.*call \.eval\(\)"),
        (
            lambda: network(nn.BatchNorm2d(3, track_running_stats=False)).eval(),
            r"no running statistics.*track_running_stats",
        ),
        (lambda: built("digits_net", "dropcov").train(), "in training mode"),
        (
            lambda: with_hook("forward_hook"),
            r"'1' \(ReLU\) has a hook \(changed\).*remove the hook, or use curvature_blocks",
        ),
        (lambda: with_hook("forward_pre_hook"), r"'1' \(ReLU\) has a hook"),
        (lambda: with_hook("full_backward_hook"), r"'1' \(ReLU\) has a hook"),
        (lambda: with_hook("full_backward_pre_hook"), r"'1' \(ReLU\) has a hook"),
        (with_own_forward, r"'1' \(ReLU\) has a forward set on the instance.*make it a class"),
        (
            lambda: extend(network(nn.ReLU(inplace=True))),
            r"'1' \(ReLU\) works in place in a network extended.*inplace=False",
        ),
        (lambda: chain().half(), r"float16 parameters: .*float32 or .*use \.float\(\)"),
        (lambda: chain().bfloat16(), "bfloat16 parameters"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "float32, float64 parameters"),
    ],
)
def test_networks(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    with pytest.raises(InputError, match=message):
        backpack_network(model)
    assert re.search(message, refused(model, data=matching(model)))


def matching(model: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch in the network's dtype."""
    images, labels = batch(nn.CrossEntropyLoss(), 2)
    return images.to(next(model.parameters()).dtype), labels


def test_a_hook_on_a_container_counts() -> None:
    model = network(nn.Sequential(nn.ReLU()))
    model[1].register_forward_hook(changed)
    assert "'1' (Sequential) has a hook" in refused(model)
    model = network()
    model.register_forward_hook(changed)
    assert "the network itself (Sequential) has a hook" in refused(model)


@pytest.mark.parametrize(
    "extension",
    [
        extensions.DiagGGNExact,
        extensions.SqrtGGNMC,
        extensions.KFAC,
        extensions.DiagHessian,
        extensions.HMP,
        extensions.KFRA,
    ],
)
def test_dropout_while_training(extension: Callable[[], BackpropExtension]) -> None:
    """BackPACK takes every zero for a dropped entry, also those of a ReLU."""
    model = network(nn.ReLU(), nn.Dropout(0.5))
    message = refused(model, extension())
    assert message.startswith(
        f"'2' (Dropout) is in training mode, where {extension.__name__} takes zeros for drops; call .eval()"
    )
    assert backpack_quantity(model.eval(), nn.CrossEntropyLoss(), batch(nn.CrossEntropyLoss(), 2), extensions.KFAC())


def test_individual_gradients_with_dropout_while_training() -> None:
    """First-order quantities are those of the drawn masks; their sum is the gradient of the same draw."""
    model, loss = network(nn.Dropout(0.5)), nn.CrossEntropyLoss()
    images, labels = batch(loss, 4)
    gradients = backpack_quantity(model, loss, (images, labels), extensions.BatchGrad(), seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        loss(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name].sum(0), parameter.grad, rtol=0, atol=1e-14)


class Scale(nn.Module):
    """A leaf of the user's own, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class Cube(nn.Module):
    """A leaf of the user's own, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x**3


def test_leaves_without_a_row() -> None:
    for extension in (extensions.BatchGrad(), extensions.DiagGGNExact(), extensions.KFAC(), extensions.HMP()):
        message = refused(network(Scale()), extension)
        assert message.startswith(
            f"'1' (Scale) has no row for {type(extension).__name__}; add its class to `DERIVATIVES`"
        )
        assert message.endswith("use curvature_blocks, which is matrix-free and works for any network")
    assert "'1' (Cube) has no row for DiagHessian" in refused(network(Cube()), extensions.DiagHessian())
    model, loss = network(Cube()), nn.CrossEntropyLoss()
    assert backpack_quantity(model, loss, batch(loss, 2), extensions.BatchL2Grad())  # nothing passes through it
    frozen = network(Scale())
    frozen[1].requires_grad_(False)
    assert backpack_quantity(frozen, loss, batch(loss, 2), extensions.BatchL2Grad())


def test_extensions() -> None:
    assert "PCHMP is refused" in refused(chain(), extensions.PCHMP())
    assert "KFAC is a class; pass an instance: KFAC()" in refused(chain(), extensions.KFAC)  # type: ignore[arg-type]
    assert "must be a BackPACK extension" in refused(chain(), "kfac")  # type: ignore[arg-type]


def test_averages_at_branches() -> None:
    model = built("cifar_resnet8", "gcp", reduced_channels=3)
    message = refused(model, extensions.KFRA(), data=batch(nn.CrossEntropyLoss(), 2, 3, 8))
    assert "KFRA at the branches of 'features.stage1.0' loses their cross terms; use KFAC or KFLR" in message


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("extension", [extensions.KFRA, extensions.GGNMP, extensions.HMP])
def test_a_twin_run_by_hand_refuses_at_the_branch(extension: Callable[[], BackpropExtension]) -> None:
    """Outside of `backpack_quantity`, which looks at the network first, the rows themselves refuse."""
    from backpack import backpack

    from secondorder.curvature.backpack.registration import register

    twin = backpack_network(built("cifar_resnet8", "gap"))
    images, labels = batch(nn.CrossEntropyLoss(), 2, 3, 8)
    value = extend(nn.CrossEntropyLoss())(twin(images), labels)
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(InputError, match=f"{extension.__name__} is wrong at a Sum.*curvature_blocks"):  # noqa: SIM117
            with backpack(register(extension())):
                value.backward()
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.L1Loss(), r"loss L1Loss\(\): must be cross-entropy, .*; for other losses use curvature_blocks"),
        (nn.functional.l1_loss, "must be cross-entropy, binary cross-entropy with logits or squared error"),
        (nn.CrossEntropyLoss(reduction="none"), "has reduction 'none'; use 'mean' or 'sum'"),
        (nn.CrossEntropyLoss(torch.ones(CLASSES + 1)), "must be 3 finite numbers of at least 0"),
    ],
)
def test_losses(loss: nn.Module, message: str) -> None:
    assert re.search(message, refused(chain(), loss=loss))


IMAGES = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        (
            (IMAGES[:0], LABELS[:0]),
            nn.CrossEntropyLoss(),
            r"shape \[0, 2, 6, 6\]: needs \[N, \.\.\.\] with at least one sample",
        ),
        ((IMAGES, LABELS[:1]), nn.CrossEntropyLoss(), r"batch of 2 images with targets of shape \[1\]"),
        ((IMAGES, None), nn.CrossEntropyLoss(), r"pair of tensors \(images, targets\)"),
        (IMAGES, nn.CrossEntropyLoss(), "pair of tensors"),
        (
            (IMAGES.float(), LABELS),
            nn.CrossEntropyLoss(),
            r"images are torch.float32 on cpu, the network is torch.float64",
        ),
        ((IMAGES, LABELS.to("meta")), nn.CrossEntropyLoss(), "targets are on meta, images on cpu"),
        ((IMAGES / 0, LABELS), nn.CrossEntropyLoss(), "images contain NaN or infinite values"),
        (
            (IMAGES, torch.tensor([0, 3])),
            nn.CrossEntropyLoss(),
            r"label 3 is out of range; the network has 3 outputs, labels must be 0\.\.2",
        ),
        ((IMAGES, torch.tensor([-1, 0])), nn.CrossEntropyLoss(), "label -1 is out of range"),
        ((IMAGES, torch.tensor([-100, -100])), nn.CrossEntropyLoss(), "no label counts"),
        (
            (IMAGES, torch.eye(3)[LABELS] - 0.1),
            nn.CrossEntropyLoss(),
            "CrossEntropyLoss is not convex at these targets",
        ),
        ((IMAGES, torch.full((2, 3), 1.5)), nn.BCEWithLogitsLoss(), "is not convex at these targets"),
        (
            (IMAGES, LABELS.float()),
            nn.CrossEntropyLoss(),
            r"class probabilities of shape \[2\]: must be finite and \[2, 3\]",
        ),
        ((IMAGES, LABELS), nn.MSELoss(), r"shape \[2\] \(torch.int64\) for outputs \[2, 3\]; squared error needs"),
        ((IMAGES, torch.zeros(2, 1).double()), nn.MSELoss(), "squared error needs equal shapes"),
        ((IMAGES, torch.full((2, 3), torch.inf)), nn.MSELoss(), "the targets contain NaN or infinity"),
        ((IMAGES[:, :1], LABELS), nn.CrossEntropyLoss(), r"cannot run on images of shape \[2, 1, 6, 6\]: .*channels"),
        ((IMAGES[0, 0, :2], LABELS), nn.CrossEntropyLoss(), r"cannot run on images of shape \[2, 6\]"),
    ],
)
def test_batches(data: Any, loss: nn.Module, message: str) -> None:
    assert re.search(message, refused(chain(), data=data, loss=loss))


def test_outputs_without_a_dimension_for_classes() -> None:
    model = nn.Sequential(nn.Conv2d(2, 1, 6), nn.Flatten(0)).double()
    assert "returns shape [1] for one image; curvature needs outputs [N, K] or [N, C, ...]" in refused(model)


def test_the_networks_own_checks_come_first() -> None:
    model = built("cifar_resnet8", "gcp", reduced_channels=3)
    message = refused(model, data=(torch.zeros(2, 3, 4, 4, dtype=torch.float64), LABELS))
    assert message.startswith("the last feature map is 1x1")


def test_the_first_module_with_nan_is_named() -> None:
    model = network(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1)), nn.ReLU())
    with torch.no_grad():
        model[1][1].weight[0, 0] = float("nan")
    data = batch(nn.CrossEntropyLoss(), 2)
    with pytest.raises(NonFiniteError, match=r"^'1\.1' \(Conv2d\) gives NaN or infinite values"):
        backpack_quantity(model, nn.CrossEntropyLoss(), data, extensions.DiagGGNExact())
