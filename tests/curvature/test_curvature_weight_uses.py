"""Weights that a network uses otherwise than by calling their layers: right where rows are concerned, refused by K-FAC."""

from collections.abc import Callable

import pytest
import torch
from small_networks import By, around, relative, reverse_ggn, rows
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.errors import InputError

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


class Tied(nn.Module):
    """An autoencoder whose decoder is the encoder transposed: a black image sees the weight once."""

    def __init__(self, decode: Callable[[nn.Linear, Tensor], Tensor], hidden: int = 4) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, hidden, bias=False), decode
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.decode(self.encode, self.encode(x).relu() + 0.1))


def transposed(encode: nn.Linear, h: Tensor) -> Tensor:
    return F.linear(h, encode.weight.T)


def penalised(encode: nn.Linear, h: Tensor) -> Tensor:
    return F.pad(h, (0, 2)) + encode.weight.square().sum()


def for_bright(encode: nn.Linear, h: Tensor) -> Tensor:
    """A second use for some images only."""
    return F.pad(h, (0, 2)) + (h.sum(1, keepdim=True) > 0.5) * transposed(encode, h)


def unseen(encode: nn.Linear, h: Tensor) -> Tensor:
    """One call without a part in the outputs, one use without a call."""
    encode(F.pad(h, (0, 2)))
    return transposed(encode, h)


DECODERS = {"transposed": transposed, "penalty": penalised, "bright images": for_bright, "unseen call": unseen}


@pytest.mark.parametrize("decoder", DECODERS)
def test_weights_used_past_their_layer(decoder: str) -> None:
    model, batch = Tied(DECODERS[decoder]).double(), rows(9)
    batch[0][:5] = 0
    G = reverse_ggn(model, CE, batch)
    for chunk in (None, 4):
        blocks = curvature_blocks(model, CE, batch, "ggn", chunk=chunk)
        assert relative(blocks.whole.dense(), G) <= 1e-12
        assert relative(blocks["encode.weight"].trace(), G[:24, :24].trace()) <= 1e-12
        assert relative(blocks.whole @ torch.ones(len(G)).double(), G.sum(1)) <= 1e-12
        with pytest.raises(InputError, match=r"encode\.weight.*leave it out of params"):
            curvature_blocks(model, CE, batch, "kfac_expand", chunk=chunk)
    for quantity in ("kfac_reduce", "ekfac"):
        with pytest.raises(InputError, match=r"encode\.weight.*leave it out of params"):
            curvature_blocks(model, CE, batch, quantity)
    assert curvature_blocks(model, CE, batch, "ekfac", ["last.weight", "last.bias"])["last.bias"].size == 3
    diagonal = curvature_blocks(model, CE, batch, "diagonal")
    assert relative(diagonal.whole.diagonal(), G.diagonal()) <= 1e-12


@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_that_are_read_past_their_module_are_refused(frozen: bool) -> None:
    model, batch = around(torch.tanh), rows()
    weight = model[0].weight
    model.append(By(lambda z: z + weight.sum()))
    weight.requires_grad_(not frozen)
    for quantity in ("ggn", "hessian", "kfac_expand", "diagonal"):
        with pytest.raises(InputError, match=r"reads parameter 0\.weight past its module.*as an attribute"):
            curvature_blocks(model, CE, batch, quantity, ["0.weight", "4.bias"])
        assert weight.requires_grad is not frozen
    assert curvature_blocks(model, CE, batch, "ggn", ["4.bias"]).whole.size == 3


class Sequences(nn.Module):
    """A linear layer whose input has images first, positions first, or both in one dimension."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.layer, self.last = order, nn.Linear(2, 3, bias=False), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (3, 2))  # [N, T, D]
        if self.order == "positions":
            h = self.layer(x.transpose(0, 1)).transpose(0, 1)
        else:
            h = self.layer(x.flatten(0, 1)).unflatten(0, (-1, 3)) if self.order == "together" else self.layer(x)
        return self.last(h.tanh().flatten(1))


@pytest.mark.parametrize("order", ["images", "positions", "together"])
@pytest.mark.parametrize("n", [3, 5])  # as many as positions, and not
def test_layers_whose_first_dimension_is_not_the_image(order: str, n: int) -> None:
    model, batch = Sequences(order).double(), rows(n)
    plain = Sequences("images").double()
    plain.load_state_dict(model.state_dict())
    G = reverse_ggn(plain, CE, batch)
    assert relative(curvature_blocks(model, CE, batch, "ggn").whole.dense(), G) <= 1e-12
    for quantity in ("kfac_expand", "kfac_reduce", "ekfac"):
        truth = curvature_blocks(plain, CE, batch, quantity)["layer.weight"].dense()
        if order == "images" or quantity == "kfac_expand":
            assert relative(curvature_blocks(model, CE, batch, quantity)["layer.weight"].dense(), truth) <= 1e-12
        else:
            with pytest.raises(InputError, match=r"layer\.weight.*first dimension.*use kfac_expand"):
                curvature_blocks(model, CE, batch, quantity)


def test_one_weight_on_images_and_on_images_with_positions_counts_all_of_them() -> None:
    class Twice(Sequences):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.last(F.pad(self.layer(x[:, :2]), (0, 6)))

    model, batch = Twice("together").double(), rows(5)
    A = curvature_blocks(model, MSE, (batch[0], torch.randn(5, 3).double()), "kfac_expand")["layer.weight"].input  # type: ignore[attr-defined]
    seen = torch.cat([batch[0].reshape(-1, 2), batch[0][:, :2]])
    assert relative(A.dense(), seen.mT @ seen / len(seen)) <= 1e-12


def test_layers_with_a_forward_of_their_own_have_no_factors() -> None:
    model, batch = around(torch.tanh), rows()
    model[2].forward = lambda x: F.linear(x, 2 * model[2].weight, model[2].bias)
    G = reverse_ggn(model, CE, batch)
    assert relative(curvature_blocks(model, CE, batch, "ggn").whole.dense(), G) <= 1e-12
    with pytest.raises(InputError, match=r"2\.weight.*leave it out of params"):
        curvature_blocks(model, CE, batch, "kfac_expand")


@pytest.mark.parametrize("n", [3, 4])  # as many as numbers in the code, and not
def test_layers_that_are_called_without_a_batch(n: int) -> None:
    class Coded(nn.Module):
        """A layer of a code, which is the same for all images."""

        def __init__(self) -> None:
            super().__init__()
            self.code, self.layer, self.last = nn.Parameter(torch.randn(3)), nn.Linear(3, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x) * self.layer(self.code).tanh()

    model, batch = Coded().double(), rows(n)
    G = reverse_ggn(model, CE, batch)
    assert relative(curvature_blocks(model, CE, batch, "ggn").whole.dense(), G) <= 1e-12
    for quantity in ("kfac_expand", "kfac_reduce", "ekfac"):
        with pytest.raises(InputError, match=r"layer of layer\.weight is called without a batch"):
            curvature_blocks(model, CE, batch, quantity, ["layer.weight"])
