"""The Hessian's diagonal with branches, exactly, and from random columns, without bias."""

from copy import deepcopy

import pytest
import torch
from backpack import backpack, extend, extensions
from small_networks import batch, chain, relative, true_hessian
from torch import Tensor, nn

from secondorder.curvature.backpack.branches import Branches, ChannelShuffle, ChannelSlice, Concatenate, Sum
from secondorder.curvature.backpack.diag_hessian_mc import BatchDiagHessianMC, DiagHessianMC
from secondorder.curvature.backpack.hessian_factors import merged, tagged
from secondorder.curvature.backpack.registration import register
from secondorder.errors import InputError
from secondorder.pooling import pooling_head

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def diagonal(
    model: nn.Module, extension: extensions.DiagHessian, loss: nn.Module, data: tuple[Tensor, Tensor], batched: int = 0
) -> Tensor:
    """The quantity of all parameters side by side."""
    twin = deepcopy(model)
    for module in twin.modules():
        if not list(module.children()):
            extend(module)  # not the containers of branches
    with backpack(register(extension)):
        extend(type(loss)(reduction=loss.reduction))(twin(data[0]), data[1]).backward()
    return torch.cat([getattr(p, extension.savefield).flatten(batched) for p in twin.parameters()], -1)


def residual_block() -> nn.Module:
    """x + f(x) with a residual, in the sense of curvature, inside: f has a Tanh."""
    return Branches(
        [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1)), nn.Sequential()], Sum()
    )


def nested_block() -> nn.Module:
    """Branches in a branch, with a sigmoid before, between and after."""
    inner = Branches([nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sigmoid()), nn.Conv2d(4, 4, 1)], Sum())
    return Branches([nn.Sequential(nn.Tanh(), inner, nn.Tanh()), nn.Conv2d(4, 4, 1), nn.Sequential()], Sum())


def shuffle_block() -> nn.Module:
    """Channels split, one half through a Tanh, joined and shuffled."""
    half = nn.Sequential(ChannelSlice(0, 2), nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())
    return nn.Sequential(Branches([half, ChannelSlice(2, 4)], Concatenate()), ChannelShuffle(2))


BLOCKS = {"residual": residual_block, "nested": nested_block, "shuffle": shuffle_block}


@pytest.mark.parametrize("head", ["gap", "gcp"])
@pytest.mark.parametrize("block", BLOCKS)
def test_residuals_inside_branches(block: str, head: str):
    """Factors of one residual are added over the branches; those of different residuals must not be."""
    loss = nn.CrossEntropyLoss()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), BLOCKS[block](), *chain(head)[4:]).double()
    data = batch(loss)
    truth = true_hessian(model, loss, data).diagonal()
    assert relative(diagonal(model, extensions.DiagHessian(), loss, data), truth) <= 1e-12
    summed = diagonal(model, extensions.BatchDiagHessian(), loss, data, 1).sum(0)
    assert relative(summed, truth) <= 1e-12


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_residual_of_one_sign(label: int):
    """The gradient at the covariance of one channel is one number: the residual has no factor of the other sign."""
    loss, head = nn.CrossEntropyLoss(), pooling_head("covariance", 1).chain()
    model = nn.Sequential(nn.Conv2d(2, 1, 3), nn.Tanh(), *head, nn.Linear(1, 3)).double()
    data = batch(loss, 1)[0], torch.tensor([label])
    truth = true_hessian(model, loss, data).diagonal()
    assert relative(diagonal(model, extensions.DiagHessian(), loss, data), truth) <= 1e-12


def test_merging_by_hand():
    one, two = torch.ones(2, 1, 3), torch.full((1, 1, 3), 2.0)
    shared = tagged({"matrices": [one], "signs": [1.0]})
    a = {"matrices": [one], "signs": list(shared["signs"])}
    b = {"matrices": [10 * one, two], "signs": [*shared["signs"], -1.0]}
    both = merged(a, b)
    assert [F.sum().item() for F in both["matrices"]] == [66.0, 6.0]
    assert both["signs"] == [1.0, -1.0]
    assert tagged(shared)["signs"][0] is shared["signs"][0]
    with pytest.raises(InputError, match="end in Sum or Concatenate"):
        merged({"matrices": [one], "signs": [1.0]}, {"matrices": [one], "signs": [1.0]})


@pytest.mark.parametrize(
    ("head", "loss", "activation"),
    [
        ("gcp", nn.CrossEntropyLoss(), nn.ReLU),
        ("gcp_exact", nn.MSELoss(), nn.Tanh),
        ("covariance", nn.CrossEntropyLoss(reduction="sum"), nn.Tanh),
    ],
)
def test_monte_carlo_diagonal_is_unbiased(head: str, loss: nn.Module, activation: type[nn.Module]):
    model, data = chain(head, activation, channels=3), batch(loss, n=2, size=4)
    truth = true_hessian(model, loss, data).diagonal()
    estimates = torch.stack([diagonal(model, DiagHessianMC(8), loss, data) for _ in range(60)])
    error = (estimates.mean(0) - truth).abs()
    assert (error <= 4 * estimates.std(0) / len(estimates) ** 0.5 + 1e-12 * truth.abs().max()).all()
    assert relative(estimates.mean(0), truth) < 0.2


def test_more_draws_are_more_accurate_and_samples_add_up():
    loss, model = nn.CrossEntropyLoss(), chain("gcp")
    data = batch(loss)
    truth = true_hessian(model, loss, data).diagonal()
    errors = {}
    for draws in (1, 64):
        estimates = torch.stack([diagonal(model, DiagHessianMC(draws), loss, data) for _ in range(10)])
        errors[draws] = (estimates - truth).square().mean().sqrt()
    assert 4 < errors[1] / errors[64] < 16  # sqrt 64 = 8
    torch.manual_seed(3)
    of_samples = diagonal(model, BatchDiagHessianMC(2), loss, data, 1)
    torch.manual_seed(3)
    assert relative(of_samples.sum(0), diagonal(model, DiagHessianMC(2), loss, data)) <= 1e-12


def test_activations_are_drawn_too():
    """Their exact factors would take a column for each feature and sign."""
    loss, model = nn.CrossEntropyLoss(), chain("gap", nn.Tanh)
    data = batch(loss)
    columns = []
    extension = register(DiagHessianMC(3))
    accumulated = extension.saved_quantities.save_quantity
    extension.saved_quantities.save_quantity = lambda key, quantity, rule: (
        columns.append(sum(len(F) for F in quantity["matrices"])),
        accumulated(key, quantity, rule),
    )
    diagonal(model, extension, loss, data)
    assert columns[-1] == 3 + 2 * 3 * 2  # classes, and two signs of 3 draws for each Tanh


@pytest.mark.parametrize("draws", [0, -1, 1.5, True])
def test_number_of_draws(draws: object):
    with pytest.raises(InputError, match="draws must be a whole number of at least 1"):
        DiagHessianMC(draws)  # type: ignore[arg-type]
