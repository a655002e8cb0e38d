"""The fused step runs only where it is what the layers are: inserted modules, hooks and overrides count."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrize

from secondorder.pooling import Covariance, MatrixSquareRoot, PoolingHead, UpperTriangle, pooling_head

GCP = ("gcp", "gcp_exact", "gcp_power", "gcp_log")


def maps() -> Tensor:
    return torch.randn(2, 5, 3, 4, dtype=torch.float64)


def gradients(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    return y, torch.autograd.grad(y.square().sum(), x)[0]


class Doubled(Covariance):
    """A covariance with another forward."""

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, weights)


class Quadrupled(MatrixSquareRoot):
    """A root with another forward, whose inherited fused step is that of the plain root."""

    def forward(self, S: Tensor) -> Tensor:
        return 4 * super().forward(S)


class TwiceTriangle(UpperTriangle):
    """A triangle with another forward."""

    def forward(self, S: Tensor) -> Tensor:
        return 2 * super().forward(S)


def scaled(head: PoolingHead, index: int, factor: float) -> None:
    """A forward set on one layer alone."""
    layer = head.layers[index]
    own = layer.forward
    layer.forward = lambda *args: factor * own(*args)


CHANGES: dict[str, tuple[Callable[[PoolingHead], object], float]] = {
    "subclass of the covariance": (lambda head: head.layers.__setitem__(0, Doubled()), 2**0.5),
    "subclass of the root": (lambda head: head.layers.__setitem__(1, Quadrupled()), 4),
    "subclass of the triangle": (lambda head: head.layers.__setitem__(2, TwiceTriangle()), 2),
    "forward of the covariance": (lambda head: scaled(head, 0, 9.0), 3),
    "forward of the root": (lambda head: scaled(head, 1, 3.0), 3),
    "forward of the triangle": (lambda head: scaled(head, 2, 3.0), 3),
    "hook of the covariance": (lambda head: head.layers[0].register_forward_hook(lambda m, x, y: 4 * y), 2),
    "hook of the root": (lambda head: head.layers[1].register_forward_hook(lambda m, x, y: 3 * y), 3),
    "hook of the triangle": (lambda head: head.layers[2].register_forward_hook(lambda m, x, y: 3 * y), 3),
    "hook of the container": (lambda head: head.layers.register_forward_hook(lambda m, x, y: 3 * y), 3),
    "pre-hook": (lambda head: head.layers[0].register_forward_pre_hook(lambda m, x: (2 * x[0],)), 2),
    "module at the front": (lambda head: head.layers.insert(0, nn.Threshold(1e9, 0.0)), 0),
    "module in between": (lambda head: head.layers.insert(1, nn.Threshold(1e9, 0.0)), 0),
    "module at the end": (lambda head: head.layers.append(nn.Threshold(1e9, 0.0)), 0),
    "module in the root's place": (lambda head: head.layers.__setitem__(1, nn.Threshold(1e9, 0.0)), 0),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_changed_layers_are_run(case: str) -> None:
    """Each change makes the result some factor of what it was."""
    change, factor = CHANGES[case]
    head, x = pooling_head("gcp", 5), maps()
    want = factor * head(x)
    change(head)
    torch.testing.assert_close(head(x), want)
    torch.testing.assert_close(head.chain()(x), want if "container" not in case else want / factor)


def test_a_convolution_before_the_covariance_learns() -> None:
    head = pooling_head("gcp", 5).double()
    head.layers.insert(0, nn.Conv2d(5, 5, 1).double())
    head(maps()).square().sum().backward()
    assert head.layers[0].weight.grad.abs().sum() > 0


def test_a_parametrised_layer_is_run() -> None:
    head, x = pooling_head("gcp", 5).double(), maps()
    head.layers[1].register_parameter("scale", nn.Parameter(torch.ones((), dtype=torch.float64)))
    parametrize.register_parametrization(head.layers[1], "scale", nn.Softplus())
    assert not head._can_fuse()
    torch.testing.assert_close(head(x), pooling_head("gcp", 5)(x))


@pytest.mark.parametrize("name", GCP)
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_fire(name: str, kind: str) -> None:
    head, x, called = pooling_head(name, 5), maps(), []
    want = gradients(head, x)
    for layer in head.layers:
        getattr(layer, kind)(lambda module, *_: called.append(type(module)))
    got = gradients(head, x)
    assert called == [type(layer) for layer in reversed(head.layers)]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_full_backward_hook])
def test_global_hooks_see_the_leaves(register: Callable) -> None:
    head, called = pooling_head("gcp", 5), []
    handle = register(lambda module, *_: called.append(type(module)))
    try:
        gradients(head, maps())
    finally:
        handle.remove()
    assert {Covariance, MatrixSquareRoot, UpperTriangle} <= set(called)


@pytest.mark.parametrize("name", GCP)
def test_the_untouched_head_is_fused_and_equal_to_its_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = pooling_head(name, 5), maps()
    handle = head.layers[0].register_forward_hook(lambda *_: None)
    want = gradients(head, x)
    handle.remove()
    monkeypatch.setattr(head.layers[0], "layout", "NCHW")  # an attribute is no override
    assert head._can_fuse()
    for got, expected in zip(gradients(head, x), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
    called: list[Tensor] = []
    monkeypatch.setattr(type(head.layers[1]), "of_features", lambda self, x: called.append(x))
    head(x)
    assert len(called) == 1


def test_changed_options_count() -> None:
    head, x = pooling_head("gcp", 5), maps()
    head.layers[1].num_iter = 9
    torch.testing.assert_close(head(x), pooling_head("gcp", 5, num_iter=9)(x))
