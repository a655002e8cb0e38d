"""What the few images that formulas are tried on do not show, and the first products with a block neither."""

from collections.abc import Callable
from threading import Event, Thread

import pytest
import torch
from experts import Experts, clipped, experts, images, routed
from own_functions import NoTangent
from small_networks import By, relative, reverse_ggn, reverse_hessian
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from secondorder.curvature import SumOverSamples, curvature_blocks
from secondorder.curvature.matrix_free.gradient_hooks import noted_hooks
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()


def summed(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z, y, reduction="sum") / 9


@pytest.mark.parametrize("chunk", [None, 2])
def test_products_are_right_after_those_with_vectors_that_tell_less(chunk: int | None) -> None:
    """Basis vectors of the large images' expert are right in forward mode, those of the other one zero."""
    model, data = experts(NoTangent.apply).double(), images()
    G = reverse_ggn(model, CE, data)
    whole = curvature_blocks(model, CE, data, "ggn", chunk=chunk).whole
    assert relative(whole @ torch.eye(len(G)).double(), G) <= 1e-12
    by_products = curvature_blocks(model, SumOverSamples(summed), data, "ggn", chunk=chunk).whole
    assert relative(by_products.dense(), G) <= 1e-12


class TwoOutputs(nn.Module):
    """One by all images, one by an expert for large images and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.large, self.small = nn.Linear(6, 1), nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = routed(x, self.large, nn.Sequential(self.small, By(NoTangent.apply)), 1)
        return torch.cat([self.all(x), out], 1)


def test_products_are_right_for_one_of_several_outputs() -> None:
    model, data, loss = TwoOutputs().double(), (images()[0], torch.randn(9, 2).double()), nn.MSELoss()
    G, v = reverse_ggn(model, loss, data), torch.randn(21).double()
    assert relative(curvature_blocks(model, loss, data, "ggn").whole @ v, G @ v) <= 1e-12


@pytest.mark.parametrize("scale", [1e-170, 1e-300, 1e200])
def test_products_of_tiny_and_huge_losses(scale: float) -> None:
    model, data = experts(torch.tanh).double(), images()
    v = torch.randn(71).double()
    product = curvature_blocks(model, lambda z, y: scale * CE(z, y), data, "ggn").whole @ v
    assert relative(product / scale, reverse_ggn(model, CE, data) @ v) <= 1e-12


class Normed(nn.Module):
    """A layer with weight norm, of operations that have all derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.g = nn.Parameter(torch.randn(4)), nn.Parameter(torch.rand(4, 1) + 0.5)
        self.v = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.bias).tanh()


def test_functions_of_another_expert_with_wrong_derivatives_are_replaced() -> None:
    truth, layer = Experts(Normed()).double(), weight_norm(nn.Linear(6, 4))
    model = Experts(nn.Sequential(layer, nn.Tanh())).double()
    for own, other in zip(model.parameters(), truth.parameters(), strict=True):
        own.data.copy_(other.data)
    data = images()
    for chunk in (None, 4):
        H = curvature_blocks(model, CE, data, "hessian", chunk=chunk).whole
        assert relative(H.dense(), reverse_hessian(truth, CE, data)) <= 1e-12


class Short(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.bfloat16(), self.weight.bfloat16(), self.bias.bfloat16()).double().tanh()


class Reentrant(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return checkpoint(super().forward, x, use_reentrant=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("small", [Short, Reentrant])
@pytest.mark.parametrize("quantity", ["ggn", "hessian", "diagonal"])
def test_what_another_expert_computes_without_curvature_is_refused(small: type[nn.Linear], quantity: str) -> None:
    model = Experts(small(6, 4)).double()
    with pytest.raises(InputError, match=r"bfloat16, too short|use_reentrant=True"):
        product(model, quantity)


def product(model: nn.Module, quantity: str) -> Tensor:
    whole = curvature_blocks(model, CE, images(), quantity).whole
    return whole @ torch.ones(whole.size).double()


def test_hooks_of_another_expert_that_clip_large_gradients_only_are_refused() -> None:
    def large(z: Tensor, y: Tensor) -> Tensor:
        return 1e6 * CE(z, y)

    function: Callable[[Tensor], Tensor] = lambda x: clipped(x, 50)  # noqa: E731
    hessian = curvature_blocks(experts(function).double(), large, images(), "hessian").whole
    with pytest.raises(InputError, match="is not linear"):
        hessian @ torch.ones(hessian.size).double()


def test_hooks_are_noted_in_threads_that_overlap() -> None:
    register, first_in, second_in = Tensor.register_hook, Event(), Event()

    def first() -> None:
        with noted_hooks():
            first_in.set()
            second_in.wait(10)

    thread = Thread(target=first)
    thread.start()
    first_in.wait(10)
    with noted_hooks() as note:
        second_in.set()
        thread.join()
        assert not note.registered
        torch.ones(2, requires_grad=True).register_hook(lambda g: g)
    assert note.registered
    assert Tensor.register_hook is register
