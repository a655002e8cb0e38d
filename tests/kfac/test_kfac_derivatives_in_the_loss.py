"""Losses with derivatives of the model in them, as PINNs and gradient penalties, are refused with their name."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.errors import InputError
from secondorder.kfac import KFAC, Fisher

Penalised = Callable[[nn.Module, Tensor], Tensor]


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    outputs = model(x)
    [slope] = torch.autograd.grad(outputs.sum(), x, create_graph=True)
    return outputs.square().mean() + slope.square().mean()


def differential_equation(model: nn.Module, x: Tensor) -> Tensor:
    [slope] = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope[:, 0] - slope[:, 1]).square().mean()


@pytest.mark.parametrize("loss", [gradient_penalty, differential_equation])
@pytest.mark.parametrize("kind", ["mc", "exact", "empirical"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_loss_with_derivatives_of_the_model_names_them(kind: str, loss: Penalised, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 9, bias), nn.Tanh(), nn.Linear(9, 1, bias))
    optimizer = KFAC(model, fisher=Fisher(kind, "mse"))
    model.register_forward_hook(lambda module, args, output: optimizer.update_curvature(output))
    loss(model, torch.randn(16, 2, requires_grad=True)).backward()
    with pytest.raises(InputError, match=r"layer .: .*autograd.grad\(create_graph=True\), as PINNs") as caught:
        optimizer.step()
    assert "check=False" not in str(caught.value)
    assert "..." not in str(caught.value)


def test_finite_differences_instead_of_derivatives_train() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 9), nn.Tanh(), nn.Linear(9, 1)).double()
    optimizer = KFAC(model, fisher="empirical")
    x = torch.randn(32, 2).double()
    e = torch.tensor([1e-3, 0.0]).double()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = ((model(x + e) - model(x - e)) / 2e-3 - x[:, 1:]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_a_graph_of_the_backward_pass_is_no_derivative_in_the_loss() -> None:
    model = nn.Linear(7, 5)
    optimizer = KFAC(model)
    logits = model(torch.randn(16, 7))
    optimizer.update_curvature(logits)
    gradients = torch.autograd.grad(
        F.cross_entropy(logits, torch.arange(16) % 5), list(model.parameters()), create_graph=True
    )
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.detach()
    optimizer.step()
