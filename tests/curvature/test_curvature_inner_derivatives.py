"""Networks that differentiate within their forward pass: physics-informed ones, hypergradients."""

from collections.abc import Callable

import pytest
import torch
from small_networks import CLASSES, relative, reverse_ggn, reverse_hessian
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from secondorder.curvature import curvature_blocks, output_jacobians
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()
Forward = Callable[[nn.Module, Tensor], Tensor]


def first(u: nn.Module, x: Tensor) -> Tensor:
    """u and its gradient."""
    x = x.requires_grad_()
    value = u(x)
    return torch.cat([value, torch.autograd.grad(value.sum(), x, create_graph=True)[0]], 1)


def laplacian(u: nn.Module, x: Tensor) -> Tensor:
    """u, its Laplacian, and a component of its gradient, with gradients on whatever is around."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = u(x)
        g = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
        second = [torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return torch.cat([value, (second[0] + second[1])[:, None], g[:, :1]], 1)


def constant(u: nn.Module, x: Tensor) -> Tensor:
    """A gradient without a graph is a constant."""
    x = x.requires_grad_()
    value = u(x)
    return torch.cat([value, value * torch.autograd.grad(value.sum(), x, retain_graph=True)[0]], 1)


def by_func(u: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([u(x), vmap(grad(lambda point: u(point).squeeze(-1)))(x)], 1)


def by_func_of_the_batch(u: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([u(x), grad(lambda points: u(points).sum())(x)], 1)


def along(u: nn.Module, x: Tensor) -> Tensor:
    value, slope = jvp(u, (x,), (torch.ones_like(x),))
    return torch.cat([value, slope, value * slope], 1)


def along_by_duals(u: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        value, slope = forward_ad.unpack_dual(u(forward_ad.make_dual(x, torch.ones_like(x))))
    return torch.cat([value, slope, value * slope], 1)


def adapted(u: nn.Module, x: Tensor) -> Tensor:
    """Outputs after a step of gradient descent."""
    w = dict(u.named_parameters())
    with torch.enable_grad():
        g = torch.autograd.grad(u(x).square().mean(), list(w.values()), create_graph=True, materialize_grads=True)
        value = functional_call(u, {name: p - 0.1 * d for (name, p), d in zip(w.items(), g, strict=True)}, (x,))
        return torch.cat([value, value.square(), value.sin()], 1)


def backwards(u: nn.Module, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    value = u(x)
    value.sum().backward(create_graph=True)
    return torch.cat([value, x.grad], 1)  # type: ignore[list-item]


class Inner(nn.Module):
    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.u, x)


FUNCTIONS = (first, laplacian, constant, by_func, by_func_of_the_batch, along, along_by_duals, adapted)


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 2).double(), torch.randint(CLASSES, (3,))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_products(function: Forward) -> None:
    net, data = Inner(function).double(), points()
    G, H = reverse_ggn(net, CE, (data[0].clone(), data[1])), reverse_hessian(net, CE, (data[0].clone(), data[1]))
    V = torch.randn(len(G), 2).double()
    ggn, hessian = (curvature_blocks(net, CE, data, quantity).whole for quantity in ("ggn", "hessian"))
    assert relative(ggn @ V, G @ V) <= 1e-10
    assert relative(hessian @ V, H @ V) <= 1e-10
    assert relative(ggn.dense(), G) <= 1e-10
    if function is not adapted:  # one step for all images
        assert relative(curvature_blocks(net, CE, data, "hessian", chunk=2).whole @ V, H @ V) <= 1e-10
    assert not data[0].requires_grad
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("function", [adapted, first])
def test_blocks_of_single_parameters(function: Forward) -> None:
    """Also where the network differentiates with respect to all of them."""
    net, data = Inner(function).double(), points()
    G, H = reverse_ggn(net, CE, (data[0].clone(), data[1])), reverse_hessian(net, CE, (data[0].clone(), data[1]))
    start = 0
    for name, p in net.named_parameters():
        place = slice(start, start := start + p.numel())
        for quantity, truth in (("ggn", G), ("hessian", H)):
            block = curvature_blocks(net, CE, data, quantity, [name]).whole
            assert (block.dense() - truth[place, place]).norm() <= 1e-10 * truth.norm()
            v = torch.randn(p.numel()).double()
            assert (block @ v - truth[place, place] @ v).norm() <= 1e-10 * truth.norm() * v.norm()
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:Using backward", "ignore:The .grad attribute")
def test_a_gradient_that_is_accumulated() -> None:
    net, data = Inner(backwards).double(), points()
    twin = Inner(first).double()
    twin.load_state_dict(net.state_dict())
    H = reverse_hessian(twin, CE, (data[0].clone(), data[1]))
    assert relative(curvature_blocks(net, CE, data, "hessian").whole.dense(), H) <= 1e-10
    assert all(p.grad is None for p in net.parameters())


def test_images_that_require_gradients() -> None:
    """As a network wants them that differentiates with respect to what it is given."""

    def given(u: nn.Module, x: Tensor) -> Tensor:
        value = u(x)
        return torch.cat([value, torch.autograd.grad(value.sum(), x, create_graph=True)[0]], 1)

    net, (x, y) = Inner(given).double(), points()
    G = reverse_ggn(net, CE, (x.requires_grad_(), y))
    for chunk in (None, 2):
        ggn = curvature_blocks(net, CE, (x, y), "ggn", chunk=chunk).whole
        v = torch.randn(len(G)).double()
        assert relative(ggn @ v, G @ v) <= 1e-10
    jacobian = output_jacobians(net, x, ["u.0.weight"]).jacobians["u.0.weight"]
    w = net.u[0].weight
    assert relative(jacobian[1, 2], torch.autograd.grad(net(x)[1, 2], w)[0].flatten()) <= 1e-10
    with pytest.raises(InputError, match=r"the network fails for images .* does not require grad"):
        curvature_blocks(net, CE, (x.detach(), y), "ggn")


@pytest.mark.parametrize("function", [first, by_func])
def test_kronecker_factors_are_refused(function: Forward) -> None:
    with pytest.raises(InputError, match="otherwise than by calling its layer"):
        curvature_blocks(Inner(function).double(), CE, points(), "kfac_expand")


def test_what_is_not_finite_is_named() -> None:
    net = Inner(first).double()
    with torch.no_grad():
        net.u[0].weight.fill_(torch.inf)
    with pytest.raises(InputError, match=r"output of u\.0 contains NaN"):
        curvature_blocks(net, CE, points(), "ggn")
