"""Products with a Jacobian that forward and reverse mode do not agree about: those of the backward pass, or refused."""

import pytest
import torch
from own_functions import BrokenForwardMode, Clipped, HalfTurn, OwnForwardMode, Sine, WrongForwardMode
from small_networks import By, around, relative, reverse_ggn, rows
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()


def normed(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.norm(dim=1, keepdim=True)
    return x / scale


def hooked(x: Tensor) -> Tensor:
    x = x.tanh()
    if x.requires_grad:
        x.register_hook(lambda g: 1.01 * g)
    return x


ONE_WAY = {
    "no_grad": normed,
    "detach": lambda x: x / x.detach().norm(dim=1, keepdim=True),
    "hook": hooked,
    "wrong forward mode": WrongForwardMode.apply,
    "broken forward mode": BrokenForwardMode.apply,
    "once differentiable, own forward mode": OwnForwardMode.apply,
}
"""Functions whose derivative is not the same in forward mode, or not in reverse mode of reverse mode."""


@pytest.mark.parametrize("function", ONE_WAY)
def test_products_are_those_of_reverse_mode_whichever_block_comes_first(function: str) -> None:
    model, batch = around(ONE_WAY[function]), rows()
    G, blocks, end = reverse_ggn(model, CE, batch), curvature_blocks(model, CE, batch, "ggn"), len(list(model))
    V = torch.randn(len(G), 2).double()
    for chosen, place in [(f"{end - 1}.weight", slice(-15, -3)), ("0.weight", slice(24))]:
        assert relative(blocks[chosen] @ V[place], G[place, place] @ V[place]) <= 1e-12
    assert relative(blocks.whole @ V, G @ V) <= 1e-12
    parts = curvature_blocks(model, CE, batch, "ggn", chunk=2).whole
    assert relative(parts @ V, G @ V) <= 1e-12


@pytest.mark.parametrize("function", ONE_WAY)
def test_single_products_of_a_larger_batch_are_those_of_reverse_mode(function: str) -> None:
    model, batch = around(ONE_WAY[function]), rows(40)
    G, end = reverse_ggn(model, CE, batch), len(list(model))
    for chosen, place in [(f"{end - 1}.weight", slice(-15, -3)), ("0.weight", slice(24)), ("2.bias", slice(44, 48))]:
        blocks = curvature_blocks(model, CE, batch, "ggn")
        one = torch.zeros(place.indices(63)[1] - place.indices(63)[0]).double()
        one[1] = 1
        for v in (one, torch.randn_like(one)):
            assert relative(blocks[chosen] @ v, G[place, place] @ v) <= 1e-12
        v = torch.randn(63).double()
        assert relative(blocks.whole @ v, G @ v) <= 1e-12
    v[-3:] = 1e8  # of which the loss knows nothing: a constant added to all logits
    assert relative(curvature_blocks(model, CE, batch, "ggn").whole @ v, G @ v) <= 1e-6


def test_a_wrong_product_is_noticed_where_its_own_size_is_right() -> None:
    model = nn.Sequential(nn.Linear(3, 4), By(HalfTurn.apply)).double()
    batch = torch.randn(40, 3).double(), torch.randn(40, 4).double()
    whole, v = curvature_blocks(model, nn.MSELoss(), batch, "ggn").whole, torch.randn(16).double()
    assert relative(whole @ v, reverse_ggn(model, nn.MSELoss(), batch) @ v) <= 1e-12


def test_products_are_refused_where_neither_mode_gives_them() -> None:
    model, batch = around(Sine.apply), rows()
    G, blocks = reverse_ggn(model, CE, batch), curvature_blocks(model, CE, batch, "ggn")
    for _ in range(2):
        with pytest.raises(InputError, match=r"Sine.*jvp.*dense\(\)"):
            blocks["4.weight"] @ torch.ones(12).double()
    assert relative(blocks.whole.dense(), G) <= 1e-12


def test_a_backward_pass_that_is_not_linear_is_refused() -> None:
    with pytest.raises(InputError, match="the backward pass of the network is not linear"):
        curvature_blocks(around(Clipped.apply), CE, rows(), "ggn").whole @ torch.ones(63).double()


def test_forward_mode_is_used_where_it_is_right() -> None:
    model, batch = around(torch.sin), rows()
    whole = curvature_blocks(model.float(), CE, (batch[0].float(), batch[1]), "ggn").whole
    whole @ torch.ones(whole.size)
    assert whole.jacobian.forward_mode is True  # type: ignore[attr-defined]
