"""The check at run time: silent where factors and gradients belong together, an error with the ratio where they do not."""

import gc
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from secondorder.curvature.kronecker.layer_kinds import Convolution
from secondorder.errors import InputError
from secondorder.kfac.agreement import agreements, rescaling
from secondorder.kfac.capture import Capture
from secondorder.kfac.fisher import output_gradients
from secondorder.kfac.layers import find_layers
from secondorder.kfac.likelihood_check import loss_ratio, verify_loss
from secondorder.kfac.scaling_check import ScalingCheck
from secondorder.kfac.statistics import LayerStatistics
from secondorder.networks import network

FISHER = SimpleNamespace(likelihood="cross_entropy", reduction="mean", grad_scaler=None)
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def checked(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, kind: str = "mc", batches: int = 1) -> ScalingCheck:
    """The check after the first step, before its verdict; `loss` is a function of the model, logits and labels."""
    layers, _ = find_layers(model)
    capture = Capture(layers, {layer.name: LayerStatistics(layer) for layer in layers}, model)
    check = ScalingCheck(layers)
    capture.start()
    if kind == "empirical":
        capture.from_backward()
        check.watch(capture)
    for images, labels in zip(x.chunk(batches), y.chunk(batches), strict=True):
        z = model(images)
        if kind == "mc":
            check.watch(capture, z, FISHER)
            capture.from_logits(z, output_gradients(z, "mc", generator=torch.Generator()))
        loss(model, z, labels).backward()
    return check


def cross_entropy(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y)


def small(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=bias),
        nn.BatchNorm2d(4),  # takes the gradient of the bias before it to zero
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, padding="same", padding_mode="circular", bias=bias),
        nn.Flatten(2),
        nn.Conv1d(4, 2, 3, dilation=2, bias=bias),
        nn.Flatten(),
        nn.Linear(10, 3, bias=bias),
    )


def data(N: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 2, 6, 6), torch.randint(3, (N,))


@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("bias", [True, False])
def test_silent_where_all_is_well(bias: bool, kind: str) -> None:
    assert checked(small(bias), *data(), cross_entropy, kind).verify()


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_silent_on_a_covariance_head_and_with_earlier_gradients(kind: str) -> None:
    model = network("cifar_resnet8", "gcp", 10)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    assert checked(model, torch.randn(4, 3, 16, 16), torch.randint(10, (4,)), cross_entropy, kind).verify()


def test_silent_on_gradients_that_cancel() -> None:
    model = nn.Sequential(nn.Linear(1, 50), nn.BatchNorm1d(50), nn.Linear(50, 3))
    check = checked(model, torch.ones(64, 1), torch.randint(3, (64,)), cross_entropy)
    assert float(model[0].weight.grad.abs().max()) < 1e-3  # type: ignore[union-attr]  # but not zero
    assert float(model[0].weight.grad.abs().max()) > 0  # type: ignore[union-attr]
    assert check.verify()


def test_silent_over_accumulated_batches_and_checkpoints() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[3:](checkpoint(self.inner[:3], x, use_reentrant=False))

    half = lambda model, z, y: F.cross_entropy(z, y) / 2  # noqa: E731
    assert checked(Checkpointed(), *data(), half, batches=2).verify()


def test_rescaling_of_weights_of_every_shape() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Unflatten(2, (4, 1)), nn.Flatten(1, 2), nn.ConvTranspose1d(12, 2, 3))
    model.append(nn.Flatten())
    loss = lambda model, z, y: F.cross_entropy(z, y) * 7  # noqa: E731
    check = checked(model, torch.randint(9, (8, 3)), torch.randint(6, (8,)), loss, "empirical")
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.ndim > 1], 1e-3)
    made = sum(float(W[..., : layer.kind.inputs].square().sum()) for layer, W in check._expected.items())
    found = agreements(check._expected, check._actual, check._size)
    assert rescaling(found.values()) == pytest.approx(1e-3 / made**0.5, rel=1e-4)


def test_silent_under_autocast() -> None:
    model, (x, y) = small(), data()

    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.inner(x)

    assert checked(Autocast(), x, y, cross_entropy).verify()


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_a_penalty_in_the_loss(kind: str) -> None:
    penalised = lambda model, z, y: F.cross_entropy(z, y) + 10 * model[7].weight.square().sum()  # noqa: E731
    ways_out = "use weight_decay.*outside the layer.*approximation={'7': 'fallback'}.*Options\\(check=False\\)"
    with pytest.raises(InputError, match=f"layer 7: the gradient of its weight is .* times .*{ways_out}"):
        checked(small(), *data(), penalised, kind).verify()


def test_the_ratio_is_that_of_the_gradients() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.register_hook(lambda g: 3 * g)
    model[0].bias.register_hook(lambda g: 3 * g)
    with pytest.raises(InputError, match="layer 0: the gradient of its weight is 3 times"):
        checked(model, torch.randn(5, 4), torch.randint(3, (5,)), cross_entropy).verify()


def test_a_layer_that_is_not_called() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.linear(x, self.one.weight))

    message = "layer one: its weight has a gradient, but its forward was never called under the hooks (ratio 0)"
    with pytest.raises(InputError, match=re.escape(message)):
        checked(Functional(), torch.randn(5, 4), torch.randint(3, (5,)), cross_entropy).verify()


def test_wrong_vectors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Convolution.weight_gradient
    monkeypatch.setattr(Convolution, "weight_gradient", lambda *args: 2 * right(*args))
    with pytest.raises(InputError, match=r"layer 0: the gradient of its weight is 0\.5 times"):
        checked(small(), *data(), cross_entropy).verify()


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_no_verdict_without_finite_gradients(kind: str) -> None:
    infinite = lambda model, z, y: F.cross_entropy(z, y) * float("inf")  # noqa: E731
    assert not checked(small(), *data(), infinite, kind).verify()
    assert not ScalingCheck(find_layers(small())[0]).verify()


def test_no_hook_is_left() -> None:
    model = small()
    check = checked(model, *data(), cross_entropy)
    check._capture.stop()  # type: ignore[union-attr]
    check.verify()
    assert not any(p._backward_hooks for p in model.parameters())


def test_a_summed_loss_that_is_declared_a_mean() -> None:
    summed = lambda model, z, y: F.cross_entropy(z, y, reduction="sum")  # noqa: E731
    message = "the loss's gradient is 8 times that of cross_entropy with reduction 'mean'; pass reduction='sum'"
    with pytest.raises(InputError, match=message):
        checked(small(), *data(8), summed).verify()


def test_accumulated_means_that_are_not_divided() -> None:
    with pytest.raises(InputError, match=r"is 2 times .*divide the loss of each of the 2 accumulated batches by 2"):
        checked(small(), *data(), cross_entropy, batches=2).verify()


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 2, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ratio_of_the_loss(reduction: str, shape: tuple[int, ...]) -> None:
    z, y = torch.randn(shape, requires_grad=True), torch.randint(3, (shape[0], *shape[2:]))
    z.data[0] = 0.0
    z.data[0, 0], y[0] = 300.0, 0  # a sample that is sure tells nothing
    positions = z[0, 0].numel()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, z)[0]

    own = gradient(F.cross_entropy(z, y, reduction=reduction))
    assert loss_ratio(z.detach(), own, "cross_entropy", reduction) == pytest.approx(1.0, rel=1e-5)
    assert loss_ratio(z.detach(), own * 512, "cross_entropy", reduction, 512.0) == pytest.approx(1.0, rel=1e-5)
    other = "sum" if reduction == "mean" else "mean"
    expected = 6 * positions if other == "mean" else 1 / (6 * positions)
    assert loss_ratio(z.detach(), own, "cross_entropy", other) == pytest.approx(expected, rel=1e-5)
    assert loss_ratio(z.detach(), own, "mse", reduction) is None
    assert loss_ratio(z.detach().bfloat16(), own, "cross_entropy", reduction) is None
    for unclear in (
        F.cross_entropy(z, y, label_smoothing=0.2, reduction=reduction),
        F.cross_entropy(z, y, torch.tensor([1.0, 2.0, 3.0]), reduction=reduction),
        F.cross_entropy(z, y.where(torch.arange(6).view(-1, *[1] * (y.ndim - 1)) != 1, -100), reduction=reduction),
        -F.cross_entropy(z, y, reduction=reduction),
    ):
        assert loss_ratio(z.detach(), gradient(unclear), "cross_entropy", reduction) is None


def test_all_samples_sure() -> None:
    z = torch.tensor([[100.0, 0.0]])
    assert loss_ratio(z, torch.zeros_like(z), "cross_entropy", "mean") is None
    verify_loss(None, "cross_entropy", "mean")
    verify_loss(1.005, "cross_entropy", "mean")
    with pytest.raises(
        InputError, match=r"0\.5 times that of cross_entropy with reduction 'sum'; pass reduction='mean'"
    ):
        verify_loss(0.5, "cross_entropy", "sum")


class Accumulated:
    """Batches of 6 and 2 rows, the mean losses times these weights."""

    def __init__(self, *weights: float, ask_first: bool = False) -> None:
        model = nn.Sequential(nn.Linear(4, 3))
        layers, _ = find_layers(model)
        self.capture = Capture(layers, {layer.name: LayerStatistics(layer) for layer in layers}, model)
        self.check = ScalingCheck(layers)
        self.capture.start()
        for rows, weight in zip((6, 2), weights, strict=False):
            z = model(torch.randn(rows, 4))
            self.check.watch(self.capture, z, FISHER)
            self.capture.from_logits(z, output_gradients(z, "mc", generator=torch.Generator()))
            loss = F.cross_entropy(z, torch.randint(3, (rows,))) * weight
            if ask_first:
                torch.autograd.grad(loss, z, retain_graph=True)
            loss.backward()


@pytest.mark.parametrize("weights", [[6 / 8, 2 / 8], [0.5, 0.5]])
def test_silent_on_unequal_batches(weights: list[float]) -> None:
    assert Accumulated(*weights).check.verify()


def test_unequal_batches_with_wrong_weights() -> None:
    message = r"or weight it by its share of rows.*deliberate factor.*harmless with relative.*Options\(check=False\) accepts it"
    with pytest.raises(InputError, match=message):
        Accumulated(1.0, 1.0).check.verify()


def test_a_gradient_that_the_user_asks_for_is_not_a_loss() -> None:
    assert Accumulated(1.0, ask_first=True).check.verify()


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_silent_on_frozen_parameters(kind: str) -> None:
    model = small()
    layers, _ = find_layers(model)
    model[0].weight.requires_grad_(False)
    model[3].bias.requires_grad_(False)
    capture = Capture(layers, {layer.name: LayerStatistics(layer) for layer in layers}, model)
    check = ScalingCheck(layers)
    capture.start()
    if kind == "empirical":
        capture.from_backward()
    check.watch(capture)
    x, y = data()
    z = model(x)
    if kind == "mc":
        capture.from_logits(z, output_gradients(z, "mc", generator=torch.Generator()))
    F.cross_entropy(z, y).backward()
    assert check.verify()


def test_the_check_is_not_kept_alive() -> None:
    passed = Accumulated(1.0)
    reference = weakref.ref(passed.check)
    gc.disable()
    try:
        del passed
        assert reference() is None
    finally:
        gc.enable()
