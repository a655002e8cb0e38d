"""What the few images that formulas are tried on do not show, and the first products with a block neither."""

from collections.abc import Callable
from threading import Event, Thread

import pytest
import torch
from small_networks import CLASSES, relative, reverse_ggn
from test_curvature_few_images import CE, Experts, _NoTangent, clipped, images
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from secondorder.curvature import SumOverSamples, curvature_blocks
from secondorder.curvature.matrix_free.gradient_hooks import noted_hooks
from secondorder.errors import InputError


class SmallBy(nn.Module):
    """Large images by one expert, others by a module."""

    def __init__(self, small: nn.Module) -> None:
        super().__init__()
        self.large, self.small, self.last = nn.Linear(6, 4), small, nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        large, out = x.norm(dim=1) > 5, x.new_zeros(len(x), 4)
        out = out.index_add(0, large.nonzero()[:, 0], self.large(x[large]).tanh())
        if not bool(large.all()):
            out = out.index_add(0, (~large).nonzero()[:, 0], self.small(x[~large]))
        return self.last(out)  # type: ignore[no-any-return]


def summed(z: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(z, y, reduction="sum") / 9


@pytest.mark.parametrize("chunk", [None, 2])
def test_products_are_right_after_those_with_vectors_that_tell_less(chunk: int | None) -> None:
    """Basis vectors of the large images' expert are right in forward mode, those of the other one zero."""
    model, data = Experts(_NoTangent.apply).double(), images()
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
        large, out = x.norm(dim=1) > 5, x.new_zeros(len(x), 1)
        out = out.index_add(0, large.nonzero()[:, 0], self.large(x[large]))
        if not bool(large.all()):
            out = out.index_add(0, (~large).nonzero()[:, 0], _NoTangent.apply(self.small(x[~large])))
        return torch.cat([self.all(x), out], 1)


def test_products_are_right_for_one_of_several_outputs() -> None:
    model, data, loss = TwoOutputs().double(), (images()[0], torch.randn(9, 2).double()), nn.MSELoss()
    G, v = reverse_ggn(model, loss, data), torch.randn(21).double()
    assert relative(curvature_blocks(model, loss, data, "ggn").whole @ v, G @ v) <= 1e-12


@pytest.mark.parametrize("scale", [1e-170, 1e-300, 1e200])
def test_products_of_tiny_and_huge_losses(scale: float) -> None:
    model, data = Experts(torch.tanh).double(), images()
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
    truth, layer = SmallBy(Normed()).double(), weight_norm(nn.Linear(6, 4))
    model = SmallBy(nn.Sequential(layer, nn.Tanh())).double()
    for own, other in zip(model.parameters(), truth.parameters(), strict=True):
        own.data.copy_(other.data)
    data = images()
    for chunk in (None, 4):
        H = curvature_blocks(model, CE, data, "hessian", chunk=chunk).whole
        assert relative(H.dense(), reverse_hessian(truth, data)) <= 1e-12


def reverse_hessian(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian by differentiating the gradient, of networks that look at numbers."""
    parameters = list(model.parameters())
    g = torch.autograd.grad(CE(model(data[0]), data[1]), parameters, create_graph=True)
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for t in g for one in t.flatten()]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


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
    model = SmallBy(small(6, 4)).double()
    with pytest.raises(InputError, match=r"bfloat16, too short|use_reentrant=True"):
        product(model, quantity)


def product(model: nn.Module, quantity: str) -> Tensor:
    whole = curvature_blocks(model, CE, images(), quantity).whole
    return whole @ torch.ones(whole.size).double()


def test_hooks_of_another_expert_that_clip_large_gradients_only_are_refused() -> None:
    def large(z: Tensor, y: Tensor) -> Tensor:
        return 1e6 * CE(z, y)

    function: Callable[[Tensor], Tensor] = lambda x: clipped(x, 50)  # noqa: E731
    hessian = curvature_blocks(Experts(function).double(), large, images(), "hessian").whole
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
