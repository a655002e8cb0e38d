"""The empirical Fisher is the Fisher with given labels in place of drawn ones: by definition, in expectation, and in K-FAC."""

from functools import cache

import pytest
import torch
from small_networks import relative
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.curvature.operators import KroneckerOperator
from secondorder.kfac import KFAC, Fisher

F64 = torch.float64
N, K, D = 3, 4, 2
WEIGHT = torch.tensor([0.5, 1.0, 3.0, 0.1], dtype=F64)
LOSSES: dict[str, nn.Module] = {
    "ce": nn.CrossEntropyLoss(),
    "ce sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
    "mse sum": nn.MSELoss(reduction="sum"),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, K)).double()


def images() -> Tensor:
    return torch.randn(N, D, dtype=F64)


@cache
def of_one(n: int, k: int, smoothing: float = 0.0) -> Tensor:
    """The empirical Fisher matrix of one image with this label."""
    torch.manual_seed(0)
    model, x = network(), images()
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    return curvature_blocks(model, loss, (x[n, None], torch.tensor([k])), "empirical_fisher").whole.dense()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("labelled", ["classes", "weighted", "ignored"])
def test_expectation_over_the_models_labels_of_cross_entropy(labelled: str, reduction: str, smoothing: float) -> None:
    """Sample by sample, over all labels with their probabilities, at the shares that the given labels have in the loss."""
    torch.manual_seed(0)
    model, x = network(), images()
    options = {"weight": WEIGHT} if labelled == "weighted" else {"ignore_index": 1} if labelled == "ignored" else {}
    given = torch.tensor([2, 0, 1])
    loss = nn.CrossEntropyLoss(reduction=reduction, **options)  # type: ignore[arg-type]
    ggn = curvature_blocks(model, loss, (x, given), "ggn").whole.dense()
    shares = torch.ones(N, dtype=F64) if labelled == "classes" else (given != 1).to(F64)
    shares = WEIGHT[given] if labelled == "weighted" else shares
    shares = shares / shares.sum() if reduction == "mean" else shares
    p = model(x).softmax(-1).detach()
    total = torch.zeros_like(ggn)
    for n in range(N):
        for k in range(K):
            total += shares[n] * p[n, k] * of_one(n, k)
    assert relative(total, ggn) <= 1e-12
    # and the empirical Fisher of the batch is that sum at its labels
    own = [of_one(n, int(given[n]), smoothing) for n in range(N)]
    if smoothing and labelled == "weighted":
        return  # smoothing mixes the weights of all classes: s_n is the mean of them
    mixed = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=smoothing, **options)  # type: ignore[arg-type]
    batch = curvature_blocks(model, mixed, (x, given), "empirical_fisher").whole.dense()
    assert relative(batch, sum(share * one for share, one in zip(shares, own, strict=True))) <= 1e-12


@pytest.mark.parametrize(("reduction", "variance"), [("mean", K / 2), ("sum", 1 / 2)])
def test_expectation_over_the_models_labels_of_squared_error(reduction: str, variance: float) -> None:
    """exp(-l_n) is a normal density of this variance; labels at +-sigma sqrt(K) along each axis have its second moments."""
    model, x, loss = network(), images(), nn.MSELoss(reduction=reduction)
    z = model(x).detach()
    total, radius = 0.0, (variance * K) ** 0.5
    for k in range(K):
        for sign in (-1, 1):
            y = z + sign * radius * F.one_hot(torch.tensor(k), K).to(F64)
            total = total + curvature_blocks(model, loss, (x, y), "empirical_fisher").whole.dense() / (2 * K)
    assert relative(total, curvature_blocks(model, loss, (x, z), "ggn").whole.dense()) <= 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_definition_for_single_samples_and_batches(name: str) -> None:
    """Docstring: 1/N sum_n g_n g_n^T, g_n the gradient of the sample's own loss; sum_n for a summed loss."""
    model, x, loss = network(), images(), LOSSES[name]
    y = torch.randn(N, K, dtype=F64) if name.startswith("mse") else torch.randint(K, (N,))
    total = 0.0
    for n in range(N):
        own = torch.autograd.grad(loss(model(x[n, None]), y[n, None]), list(model.parameters()))
        g = torch.cat([part.flatten() for part in own])
        total = total + torch.outer(g, g) / (N if loss.reduction == "mean" else 1)
    assert relative(curvature_blocks(model, loss, (x, y), "empirical_fisher").whole.dense(), total) <= 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_the_factors_of_the_optimiser_are_those_of_the_blocks(name: str) -> None:
    model, x, loss = network(), images(), LOSSES[name]
    y = torch.randn(N, K, dtype=F64) if name.startswith("mse") else torch.randint(K, (N,))
    blocks = curvature_blocks(model, loss, (x, y), "kfac_expand", ["0.weight", "2.weight"], fisher="empirical")
    likelihood = "mse" if name.startswith("mse") else "cross_entropy"
    optimiser = KFAC(model, 0.1, fisher=Fisher("empirical", likelihood, reduction=loss.reduction))
    loss(model(x), y).backward()
    optimiser.step()
    for layer, parameter in (("0", "0.weight"), ("2", "2.weight")):
        block = blocks[parameter]
        assert isinstance(block, KroneckerOperator)
        B = optimiser.preconditioner.gathering.statistics[layer].B
        assert B is not None
        samples = 1 if loss.reduction == "mean" else N  # K-FAC's factors are means over the samples
        assert relative(samples * B[0], block.gradient.dense()) <= 1e-12
