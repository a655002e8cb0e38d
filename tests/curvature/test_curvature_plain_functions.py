"""Functions that stand in for those of PyTorch: the same numbers, and derivatives of every order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import CLASSES, relative, true_ggn, true_hessian
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm as weight_normed

from secondorder.curvature import curvature_blocks
from secondorder.curvature.matrix_free.plain_functions import (
    REPLACEMENTS,
    embedding,
    embedding_bag,
    layer_norm,
    weight_norm,
)

CE = nn.CrossEntropyLoss()
F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


TOKENS = torch.tensor([[0, 1, 1], [2, 4, 1], [3, 3, 0], [1, 1, 1]])
OFFSETS = torch.tensor([0, 2, 2, 7, 12])  # an empty bag in the middle, and one at the end
BAGS: dict[str, dict[str, Any]] = {
    "rows": {"input": TOKENS},
    "rows, padding": {"input": TOKENS, "padding_idx": 1},
    "last padding": {"input": TOKENS, "padding_idx": -1},
    "offsets": {"input": TOKENS.flatten(), "offsets": OFFSETS},
    "last offset": {"input": TOKENS.flatten(), "offsets": OFFSETS, "include_last_offset": True},
    "offsets, padding": {"input": TOKENS.flatten(), "offsets": OFFSETS, "padding_idx": 1},
    "norm": {"input": TOKENS, "max_norm": 0.5},
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("case", BAGS)
def test_bags(case: str, mode: str) -> None:
    weight = drawn(5, 3).requires_grad_()
    ours, theirs = (f(weight=weight.clone(), mode=mode, **BAGS[case]) for f in (embedding_bag, F.embedding_bag))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    u = drawn(*ours.shape, seed=1)
    gradients = [torch.autograd.grad(z, weight, u)[0] for z in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=1e-16)
    if "max_norm" not in BAGS[case]:

        def function(w: Tensor) -> Tensor:
            return embedding_bag(weight=w.sin(), mode=mode, **BAGS[case]).exp()

        assert torch.autograd.gradcheck(function, (weight,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, (weight,))


def test_weights_of_the_tokens_of_a_bag() -> None:
    weight, shares = drawn(5, 3).requires_grad_(), drawn(4, 3, seed=2).requires_grad_()
    options = {"input": TOKENS, "weight": weight, "mode": "sum", "per_sample_weights": shares}
    ours, theirs = embedding_bag(**options), F.embedding_bag(**options)  # type: ignore[arg-type]
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-16)
    for a, b in zip(*(torch.autograd.grad(z.sum(), (weight, shares)) for z in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


def test_rows() -> None:
    weight = drawn(5, 3).requires_grad_()
    for options in ({"sparse": True}, {"scale_grad_by_freq": True, "padding_idx": 1}):
        ours, theirs = (f(TOKENS, weight, **options) for f in (embedding, F.embedding))  # type: ignore[operator]
        assert torch.equal(ours, theirs)
    gradient = torch.autograd.grad(ours.sum(), weight)[0]
    assert torch.equal(gradient[:, 0], torch.tensor([2, 0, 1, 2, 1]).double())


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_weight_norm(dim: int) -> None:
    v = drawn(3, 4, 2).requires_grad_()
    g = torch.norm_except_dim(v, 2, dim).detach().mul(1.7).requires_grad_()
    torch.testing.assert_close(weight_norm(v, g, dim), torch._weight_norm(v, g, dim), rtol=1e-13, atol=0)
    assert torch.autograd.gradgradcheck(lambda v, g: weight_norm(v, g, dim), (v, g))
    one = drawn(3).requires_grad_()
    torch.testing.assert_close(weight_norm(one, one.abs()), torch._weight_norm(one, one.abs(), 0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_layer_norm(shape: tuple[int, ...], affine: bool) -> None:
    x, w, b = drawn(2, 3, 4).requires_grad_(), *(drawn(*shape, seed=s).requires_grad_() for s in (1, 2))
    options = (w, b) if affine else (None, None)
    torch.testing.assert_close(
        layer_norm(x, shape, *options, 0.1), F.layer_norm(x, shape, *options, 0.1), rtol=1e-12, atol=1e-14
    )

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(layer_norm(x, shape, w, b).sin().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, (x,))


# ---------------------------------------------------------------------------------------------------------- in networks


class Bag(nn.Module):
    """A bag of embeddings and a linear layer, or the same by a function."""

    def __init__(self, mode: str, functional: bool = False) -> None:
        super().__init__()
        self.bag, self.last = nn.EmbeddingBag(5, 4, mode=mode, sparse=mode != "max"), nn.Linear(4, CLASSES)
        self.functional = functional

    def forward(self, words: Tensor) -> Tensor:
        if self.functional:
            rows = F.embedding(words, self.bag.weight, sparse=self.bag.sparse)
            return self.last(getattr(rows, self.bag.mode.replace("max", "amax"))(1).tanh())
        return self.last(self.bag(words).tanh())


class PlainBag(Bag):
    """With operations that torch.func knows."""

    def forward(self, words: Tensor) -> Tensor:
        rows = self.bag.weight[words]
        return self.last(getattr(rows, self.bag.mode.replace("max", "amax"))(1).tanh())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_bags_and_sparse_embeddings_in_a_network(mode: str, functional: bool, chunk: int | None) -> None:
    model, plain = Bag(mode, functional).double(), PlainBag(mode).double()
    plain.load_state_dict(model.state_dict())
    data = TOKENS, torch.tensor([0, 2, 1, 1])
    for quantity, truth in (("ggn", true_ggn), ("hessian", true_hessian)):
        expected = truth(plain, CE, data)
        whole = curvature_blocks(model, CE, data, quantity, chunk=chunk).whole
        V = drawn(len(expected), 2)
        assert relative(whole.dense(), expected) <= 1e-12
        assert relative(whole @ V, expected @ V) <= 1e-12
    assert model.bag.sparse is (mode != "max")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("old", [False, True])
def test_weight_norm_in_a_network(dim: int, old: bool) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.g, self.v = (nn.Parameter(p.detach().clone()) for p in model[0].parameters())
            self.last = model[2]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(x, weight_norm(self.v, self.g, dim), self.bias).tanh())

    norm = torch.nn.utils.weight_norm if old else weight_normed
    model = nn.Sequential(norm(nn.Linear(6, 4), dim=dim), nn.Tanh(), nn.Linear(4, 3)).double()
    data = drawn(5, 6), torch.tensor([0, 2, 1, 1, 0])
    truth = true_hessian(Plain(), CE, data)
    assert relative(curvature_blocks(model, CE, data, "hessian").whole.dense(), truth) <= 1e-12


class Physics(nn.Module):
    """u and some of its first and second derivatives by x, with layer_norm inside."""

    def __init__(self, norm: Callable[..., Tensor], second: bool) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)
        self.function, self.second = norm, second

    def u(self, x: Tensor) -> Tensor:
        h = self.function(self.first(x), (4,), self.norm.weight, self.norm.bias, 0.1)
        return self.last(h.tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = self.u(x)
        slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        bend = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)[0] if self.second else slope
        return torch.cat([u, slope[:, :1], bend[:, 1:]], 1)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("quantity", ["ggn", "hessian", "diagonal"])
def test_layer_norm_in_a_network_that_differentiates_itself(quantity: str, second: bool) -> None:
    """Its Hessian takes the third derivative; that of an operator of second order takes it in the Gauss-Newton matrix, too."""
    model, plain = Physics(F.layer_norm, second).double(), Physics(layer_norm, second).double()
    plain.load_state_dict(model.state_dict())
    data = drawn(3, 2), drawn(3, 3, seed=1)
    found, truth = (curvature_blocks(net, nn.MSELoss(), data, quantity).whole.dense() for net in (model, plain))
    assert relative(found, truth) <= 1e-12


def test_functions_are_those_of_pytorch_again() -> None:
    data = TOKENS, torch.tensor([0, 2, 1, 1])
    model = Bag("mean").double()
    curvature_blocks(model, CE, data, "hessian").whole.dense()
    assert model.bag(TOKENS).grad_fn.name() == "EmbeddingBagBackward0"
    assert {row.node for row in REPLACEMENTS} >= {"EmbeddingBagBackward0", "EmbeddingBackward0"}
