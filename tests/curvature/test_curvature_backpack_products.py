"""What the products of GGNMP and HMP take, and when they are refused."""

from collections.abc import Callable

import pytest
import torch
from backpack import extensions
from backpack.extensions.backprop_extension import BackpropExtension
from labelled_losses import drawn
from small_networks import batch, built, chain, relative, true_ggn
from torch import Tensor, nn

from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.errors import InputError

LOSS = nn.CrossEntropyLoss()
NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, Tensor]]]] = {
    "chain": lambda: (chain("gcp", nn.Tanh), batch(LOSS, 3)),
    "branches": lambda: (built("cifar_resnet8", "gap"), batch(LOSS, 2, 3, 8)),
}
PRODUCTS = pytest.mark.parametrize("extension", [extensions.GGNMP, extensions.HMP])


@PRODUCTS
@pytest.mark.parametrize("kind", NETWORKS)
def test_matrices_that_do_not_fit(kind: str, extension: Callable[[], BackpropExtension]) -> None:
    """Also one with as many numbers as the parameter in another order, which could be multiplied."""
    network, data = NETWORKS[kind]()
    name, parameter = list(network.named_parameters())[-2]
    multiply = backpack_quantity(network, LOSS, data, extension())[name]
    fitting = torch.ones(2, *parameter.shape, dtype=torch.float64)
    assert multiply(fitting).shape == fitting.shape
    for wrong in (
        fitting[0],
        fitting[:0],
        fitting.mT,
        fitting.flatten(1),
        fitting.float(),
        fitting.long(),
        fitting.sum(),
    ):
        with pytest.raises(InputError, match=rf"mat of shape .* the product with {name} needs \[V, .*float64"):
            multiply(wrong)


@PRODUCTS
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_step_later_they_are_refused(kind: str, extension: Callable[[], BackpropExtension]) -> None:
    """Activations of old parameters and the new ones made a matrix of no network."""
    network, data = NETWORKS[kind]()
    products = backpack_quantity(network, LOSS, data, extension())
    name, parameter = list(network.named_parameters())[-1]
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(InputError, match=rf"parameter {name} has changed since this curvature was made; make it anew"):
        products[name](torch.ones(1, *parameter.shape, dtype=torch.float64))


def test_matrices_of_several_rows_and_a_graph() -> None:
    network, data = NETWORKS["chain"]()
    name, parameter = list(network.named_parameters())[-2]
    size, after = parameter.numel(), list(network.parameters())[-1].numel()
    V = drawn(3, *parameter.shape).requires_grad_()
    found = backpack_quantity(network, LOSS, data, extensions.GGNMP())[name](V)
    block = true_ggn(network, LOSS, data)[-size - after : -after, -size - after : -after]
    assert not found.requires_grad
    assert relative(found.flatten(1), (V.flatten(1) @ block).detach()) <= 1e-11
