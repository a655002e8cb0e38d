"""Kronecker factors of networks whose images act on one another (batch norm in training mode), against torch.func."""

import pytest
import torch
from small_networks import relative, reverse_ggn
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks
from secondorder.curvature.operators import EigenbasisOperator, KroneckerOperator

F64, N, K = torch.float64, 4, 3


def dense() -> tuple[nn.Sequential, Tensor]:
    layers = [nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, K)]
    return nn.Sequential(*layers).double(), torch.randn(N, 4, dtype=F64)


def convolution() -> tuple[nn.Sequential, Tensor]:
    layers = [nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, K)]
    return nn.Sequential(*layers).double(), torch.randn(N, 1, 3, 3, dtype=F64)


LOSSES = {"cross-entropy": (nn.CrossEntropyLoss(), torch.tensor([0, 2, 1, 1])),
          "squared error": (nn.MSELoss(), torch.linspace(-1, 1, N * K, dtype=F64).view(N, K))}  # fmt: skip


def columns(z: Tensor, loss: nn.Module, y: Tensor, fisher: str) -> Tensor:
    """F `[N, K, R]` of each image, with F F^T = M, or of the given labels."""
    if fisher == "empirical":
        z = z.detach().requires_grad_()
        return torch.autograd.grad(loss(z, y), z)[0][..., None] * N**0.5
    if isinstance(loss, nn.MSELoss):
        return torch.eye(K, dtype=F64).expand(N, K, K) * (2 / N / K) ** 0.5
    p = z.detach().softmax(1)
    return (torch.eye(K, dtype=F64) - p[..., None]) * (p[:, None] / N).sqrt()


def true_gradients(model: nn.Sequential, x: Tensor, loss: nn.Module, y: Tensor, fisher: str) -> Tensor:
    """s `[N R, N, *out]` at the first layer's output of each column of each image, one backward pass for each."""
    out = model[0](x)
    z = model[1:](out)
    F = columns(z, loss, y, fisher)
    found = []
    for n in range(N):
        for r in range(F.shape[-1]):
            U = torch.zeros_like(z)
            U[n] = F[n, :, r]
            found.append(torch.autograd.grad(z, out, U, retain_graph=True)[0])
    return torch.stack(found)


@pytest.mark.parametrize("make", [dense, convolution])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_factors_are_those_of_each_column_of_each_image(make: object, fisher: str, loss: str) -> None:
    model, x = make()  # type: ignore[operator]
    function, y = LOSSES[loss]
    s = true_gradients(model, x, function, y, fisher)
    s = s.flatten(3).mT if s.ndim == 5 else s[:, :, None]  # [N R, N, T, O]
    for quantity, vectors in (("kfac_expand", s.flatten(0, 2)), ("kfac_reduce", s.sum(2).flatten(0, 1))):
        block = curvature_blocks(model, function, (x, y), quantity, ["0.weight", "0.bias"], fisher=fisher)
        assert isinstance(block["0.weight"], KroneckerOperator)
        assert relative(block["0.weight"].gradient.dense(), vectors.mT @ vectors) <= 1e-12
        assert relative(block["0.bias"].dense(), vectors.mT @ vectors) <= 1e-12


@pytest.mark.parametrize("make", [dense, convolution])
@pytest.mark.parametrize("loss", LOSSES)
def test_ekfac_has_the_diagonal_of_the_exact_block(make: object, loss: str) -> None:
    model, x = make()  # type: ignore[operator]
    function, y = LOSSES[loss]
    G = reverse_ggn(model, function, (x, y))
    start = 0
    for name, p in model.named_parameters():
        place = slice(start, start := start + p.numel())
        if not name.startswith("1."):
            block = curvature_blocks(model, function, (x, y), "ekfac", [name], memory=10**5)[name]
            assert isinstance(block, EigenbasisOperator)
            Q = torch.kron(block.gradient_basis, block.input_basis)
            truth = ((Q.mT @ G[place, place]) * Q.mT).sum(1)
            assert float((block.scales.flatten() - truth).abs().max()) <= 1e-12 * float(G.abs().max())


@pytest.mark.parametrize("quantity", ["kfac_expand", "kfac_reduce", "ekfac"])
def test_drawn_labels_give_the_same_in_the_mean(quantity: str) -> None:
    model, x = dense()
    loss, y = LOSSES["cross-entropy"]
    names = ["0.weight", "3.weight"]
    exact, drawn = (
        curvature_blocks(model, loss, (x, y), quantity, names, fisher=fisher, samples=200) for fisher in ("exact", "mc")
    )
    for name in names:
        assert relative(drawn[name].dense(), exact[name].dense()) <= 0.35
