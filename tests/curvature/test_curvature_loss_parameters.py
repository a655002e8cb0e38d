"""Losses that are not functions of the outputs alone: refused, and what weight decay adds."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from small_networks import around, relative, rows
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from secondorder.curvature import DampedOperator, curvature_blocks, spectral_summary
from secondorder.errors import InputError

CE = nn.CrossEntropyLoss()


class Penalised(nn.Module):
    """A loss that holds the network."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + 0.05 * sum(p.square().sum() for p in self.model.parameters())


def decayed(z: Tensor, y: Tensor, weights: list[nn.Parameter]) -> Tensor:
    return F.cross_entropy(z, y) + 0.05 * sum(w.square().sum() for w in weights)


def with_hook(model: nn.Module) -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, args, value: value + 0.05 * model[0].weight.square().sum())
    return loss


def with_forward(model: nn.Module) -> nn.Module:
    loss = nn.MSELoss()
    loss.forward = lambda z, y: z.square().mean() + model[0].weight.square().sum()  # type: ignore[method-assign]
    return loss


LOSSES: dict[str, Callable[[nn.Sequential], Callable[[Tensor, Tensor], Tensor]]] = {
    "lambda": lambda model: lambda z, y: F.cross_entropy(z, y) + 0.05 * model[0].weight.square().sum(),
    "partial": lambda model: partial(decayed, weights=list(model.parameters())),
    "module": Penalised,
    "second forward": lambda model: (
        lambda z, y: F.cross_entropy(z, y) + model(torch.ones(1, 6).double()).square().sum()
    ),
    "hook": with_hook,
    "forward": with_forward,
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_that_depend_on_parameters_are_refused(loss: str, frozen: bool) -> None:
    model, batch = around(torch.tanh), rows()
    names = [name for name, _ in model.named_parameters()]
    model.requires_grad_(not frozen)
    made = LOSSES[loss](model)
    for quantity in ("ggn", "hessian"):
        with pytest.raises(InputError, match=r"depends on parameter \d.weight.* DampedOperator\(block, c\)"):
            curvature_blocks(model, made, batch, quantity, names)
    assert {p.requires_grad for p in model.parameters()} == {not frozen}
    if loss not in ("partial", "module", "second forward"):  # a parameter that the loss does not read
        assert curvature_blocks(model, made, batch, "hessian", ["4.bias"])["4.bias"].dense().norm() > 0


def test_weight_decay_is_added_by_a_damped_operator() -> None:
    model, batch = around(torch.tanh), rows()
    parameters = dict(model.named_parameters())
    truth = torch.autograd.functional.hessian(
        lambda w: (
            Penalised(model).forward(functional_call(model, {"0.bias": w}, (batch[0],)), batch[1])
            + 0.05 * (w.square().sum() - model[0].bias.detach().square().sum())
        ),
        parameters["0.bias"].detach(),
    )
    H = curvature_blocks(model, CE, batch, "hessian")["0.bias"]
    assert relative(DampedOperator(H, 0.1).dense(), truth) <= 1e-12
    summary = spectral_summary(DampedOperator(curvature_blocks(model, CE, batch, "ggn").whole, 0.1))
    assert abs(float(summary.smallest.value) - 0.1) <= 1e-12
    for damping in (-1, float("nan"), "1", None):
        with pytest.raises(InputError, match="damping must be"):
            DampedOperator(H, damping)  # type: ignore[arg-type]


def test_losses_with_parameters_and_constants_of_their_own_are_functions_of_the_outputs() -> None:
    model, batch = around(torch.tanh), rows()
    scale = nn.Parameter(torch.tensor(2.0).double())
    fixed = [p.detach().clone() for p in model.parameters()]
    loss = lambda z, y: F.cross_entropy(scale * z, y) + sum(p.square().sum() for p in fixed)  # noqa: E731
    plain = lambda z, y: F.cross_entropy(2 * z, y)  # noqa: E731
    v = torch.randn(curvature_blocks(model, loss, batch, "ggn").whole.size).double()
    found, expected = (curvature_blocks(model, one, batch, "hessian").whole @ v for one in (loss, plain))
    assert relative(found, expected) <= 1e-12


class Counting(nn.Module):
    """A temperature that rises with every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()).double())

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        return F.cross_entropy(z * self.count, y)


CHANGING: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "dropout": lambda: lambda z, y: F.cross_entropy(F.dropout(z, 0.5), y),
    "samples": lambda: lambda z, y: F.softplus(z[:, torch.randint(z.shape[1], ())]).mean() + F.cross_entropy(z, y),
    "draws of no account": lambda: lambda z, y: F.cross_entropy(z, y) + 0 * torch.rand(()),
    "state": Counting,
}


@pytest.mark.parametrize("kind", CHANGING)
@pytest.mark.parametrize("quantity", ["ggn", "hessian"])
def test_losses_that_change_from_one_evaluation_to_the_next_are_refused(kind: str, quantity: str) -> None:
    model, batch, state = around(torch.tanh), rows(), torch.get_rng_state()
    with pytest.raises(InputError, match=r"differs from one evaluation to the next.*draw before"):
        curvature_blocks(model, CHANGING[kind](), batch, quantity)
    assert torch.equal(state, torch.get_rng_state())
