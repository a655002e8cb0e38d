"""Layers and settings that PyTorch has no gradient for, or another one than that of the function: right, or refused in a line."""

from collections.abc import Callable

import pytest
import torch
from small_networks import CLASSES, relative, true_ggn, true_hessian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secondorder.curvature import curvature_blocks, kronecker_parameters, output_jacobians
from secondorder.errors import InputError
from secondorder.landscape import optimiser_step, weight_landscape

CE = nn.CrossEntropyLoss()


class Words(nn.Module):
    """The mean of the vectors of some words, and a linear layer."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3, **options), nn.Linear(3, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embed(words).mean(1).tanh())


class Wrapped(nn.Module):
    """A function around one of two linear layers."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function = nn.Linear(2, 3), nn.Linear(3, CLASSES), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first, x).float())


def reentrant(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x.requires_grad_(), use_reentrant=True)


def in_bfloat16(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 2), torch.randint(CLASSES, (3,))


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_options_of_an_embedding_s_gradient_do_not_count(option: str) -> None:
    net, plain = Words(**{option: True}).double(), Words().double()
    plain.load_state_dict(net.state_dict())
    data = torch.tensor([[0, 1, 1], [2, 1, 4]]), torch.tensor([0, 2])
    G, H = true_ggn(plain, CE, data), true_hessian(plain, CE, data)
    V = torch.randn(len(G), 2).double()
    ggn, hessian = (curvature_blocks(net, CE, data, quantity).whole for quantity in ("ggn", "hessian"))
    assert relative(ggn @ V, G @ V) <= 1e-10
    assert relative(ggn.dense(), G) <= 1e-10
    assert relative(hessian @ V, H @ V) <= 1e-10
    assert getattr(net.embed, option)


@pytest.mark.parametrize("quantity", ["ggn", "hessian", "diagonal", "kfac_expand"])
def test_what_is_refused_in_a_line(quantity: str) -> None:
    data = points()
    with pytest.raises(
        InputError, match=r"checkpoint hides parameters with use_reentrant=True; call it with use_reentrant=False"
    ):
        curvature_blocks(Wrapped(reentrant), CE, data, quantity)
    with pytest.raises(InputError, match=r"computes in torch\.bfloat16, too short for curvature; leave autocast"):
        curvature_blocks(Wrapped(in_bfloat16), CE, data, quantity)


def test_other_functions_refuse_in_a_line_too() -> None:
    x, y = points()
    etas = torch.tensor([0.1])
    with pytest.raises(InputError, match="use_reentrant=False"):
        output_jacobians(Wrapped(reentrant), x, ["first.weight"])
    with pytest.raises(InputError, match="network int: must be a"):
        kronecker_parameters(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="use_reentrant=False"):
        weight_landscape(Wrapped(reentrant), CE, x, y, etas)
    net = Wrapped(reentrant)
    with pytest.raises(InputError, match="use_reentrant=False"):
        optimiser_step(net, torch.optim.SGD(net.parameters(), 0.1), CE, x, y)
    with pytest.raises(InputError, match=r"etas are list: must be a tensor \[K\]"):
        weight_landscape(nn.Linear(2, CLASSES), CE, x, y, [0.1])  # type: ignore[arg-type]
    for model in (nn.LazyLinear(CLASSES), nn.Linear(2, CLASSES, device="meta")):
        with pytest.raises(InputError, match="parameter weight has no numbers yet"):
            weight_landscape(model, CE, x, y, etas)


def test_complex_parameters_are_refused() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.last = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64)), nn.Linear(3, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((x.to(self.w) @ self.w).abs())

    for quantity in ("ggn", "hessian", "kfac_expand"):
        with pytest.raises(InputError, match=r"parameter w is torch.complex64; curvature is that of real"):
            curvature_blocks(Complex(), CE, points(), quantity)
    assert curvature_blocks(Complex(), CE, points(), "kfac_expand", ["last.weight"]).whole.size == 3 * CLASSES


class Experts(nn.Module):
    """Each image by one of two experts, of which the second gets none."""

    def __init__(self, expert: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second, self.last = expert(), expert(), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        chosen, out = x.flatten(1).sum(1) > 1e3, x.new_zeros(len(x), 8)
        for places, expert in ((~chosen, self.first), (chosen, self.second)):
            index = places.nonzero()[:, 0]
            out = out.index_add(0, index, expert(x[index]).flatten(1))
        return self.last(out.tanh())  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_layer_that_gets_no_image_has_zero_factors(kind: str) -> None:
    made: Callable[[], nn.Module] = (lambda: nn.Conv2d(1, 2, 2)) if kind == "convolution" else (lambda: nn.Linear(4, 8))
    model, loss = Experts(made).double(), nn.CrossEntropyLoss()
    data = torch.randn(4, *((1, 3, 3) if kind == "convolution" else (4,))).double(), torch.randint(CLASSES, (4,))
    names = ["first.weight", "second.weight", "second.bias"]
    blocks = curvature_blocks(model, loss, data, "kfac_expand", names)
    alone = nn.Sequential(model.first, nn.Flatten(), nn.Tanh(), model.last)
    truth = curvature_blocks(alone, loss, data, "kfac_expand", ["0.weight"])["0.weight"].dense()
    assert relative(blocks["first.weight"].dense(), truth) <= 1e-12
    assert not bool(blocks["second.weight"].dense().any())
    assert not bool(blocks["second.bias"].dense().any())
    with pytest.raises(
        InputError, match=r"second\.weight is called with inputs whose first dimension is not the image"
    ):
        curvature_blocks(model, loss, data, "ekfac", names)
