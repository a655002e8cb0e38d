"""Quantities from chunks of the batch equal those of the whole; memory decides how large the chunks are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backpack import extensions
from backpack.extensions.backprop_extension import BackpropExtension
from quantity_values import EXACT, LOSSES, RANDOM, assert_equal
from small_networks import CLASSES, batch, chain, relative
from torch import nn

from secondorder.curvature.backpack import chunks, kronecker
from secondorder.curvature.backpack.conversion import backpack_network
from secondorder.curvature.backpack.diag_hessian_mc import DiagHessianMC
from secondorder.curvature.backpack.kronecker import WeightSharingKFLR
from secondorder.curvature.backpack.merging import MERGES
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.curvature.backpack.registration import register
from secondorder.curvature.operators.factored import FactoredOperator
from secondorder.errors import InputError


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error, sum"])  # what is divided by samples and what is not
@pytest.mark.parametrize("extension", EXACT)
def test_chunks_give_the_whole_batch(extension: Callable[[], BackpropExtension], loss: str) -> None:
    network, criterion = chain(activation=nn.Tanh, channels=2), LOSSES[loss]()
    data = batch(criterion, 5)
    whole = backpack_quantity(network, criterion, data, extension(), chunk=5)
    assert_equal(backpack_quantity(network, criterion, data, extension(), chunk=2), whole, network)
    assert_equal(backpack_quantity(network, criterion, data, extension()), whole, network)


@pytest.mark.parametrize("loss", ["cross-entropy", "squared error, sum"])
def test_chunks_of_factors_that_are_kept_as_rows(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker, "WIDE_INPUT", 8)
    network, criterion = chain(), LOSSES[loss]()
    data = batch(criterion, 5)
    whole = backpack_quantity(network, criterion, data, WeightSharingKFLR(), chunk=5)
    parts = backpack_quantity(network, criterion, data, WeightSharingKFLR(), chunk=2)
    name = [name for name, _ in network.named_parameters() if name.endswith("weight")][-1]
    assert isinstance(parts[name][1], FactoredOperator)
    assert relative(parts[name][1].dense(), whole[name][1].dense()) <= 1e-12


def test_every_extension_has_a_rule_for_chunks_or_is_refused() -> None:
    """KFRA alone averages at every layer."""
    assert {type(make()) for make in (*EXACT, *RANDOM)} == set(MERGES)
    network, loss = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), nn.CrossEntropyLoss()
    data = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    with pytest.raises(InputError, match="chunk 2: KFRA cannot be put together"):
        backpack_quantity(network, loss, data, extensions.KFRA(), chunk=2)
    assert list(backpack_quantity(network, loss, data, extensions.KFRA(), chunk=7)) == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    with pytest.raises(InputError, match="SqrtGGNExact cannot be put together"):
        backpack_quantity(network, loss, data, extensions.SqrtGGNExact(subsampling=[0, 2]), chunk=1)


def test_random_diagonals_are_unbiased_in_chunks() -> None:
    """Mean of 100 draws within 4 standard errors, over all entries together."""
    network, loss = chain("gap"), nn.CrossEntropyLoss()
    data = batch(loss, 3)
    exact = backpack_quantity(network, loss, data, extensions.DiagGGNExact())["0.weight"].sum()
    draws = torch.stack(
        [
            backpack_quantity(network, loss, data, extensions.DiagGGNMC(), chunk=2, seed=seed)["0.weight"].sum()
            for seed in range(100)
        ]
    )
    assert (draws.mean() - exact).abs() <= 4 * draws.std() / 10
    assert draws.std() > 0


def test_memory_decides_the_chunk_and_too_little_is_refused_with_the_number() -> None:
    network, loss = chain(), nn.CrossEntropyLoss()
    data = batch(loss, 8)
    _, sizes = chunks.run_once(backpack_network(network), data[0][:1])
    extension = register(extensions.DiagGGNExact())
    fixed, each = chunks.numbers_needed(sizes, extension, CLASSES, 8)
    assert fixed == 0
    assert chunks.chunk_size(sizes, extension, data[0], CLASSES) == 8
    assert chunks.chunk_size(sizes, extension, data[0], CLASSES, memory=3 * 8 * each + 1) == 3
    small = backpack_quantity(network, loss, data, extension, memory=8 * each)
    assert_equal(small, backpack_quantity(network, loss, data, extension), network)
    message = r"DiagGGNExact of 1 of 8 samples at a time needs about .* GiB, .* GiB are available; use smaller images"
    with pytest.raises(InputError, match=message):
        backpack_quantity(network, loss, data, extension, memory=8 * each - 1)
    with pytest.raises(InputError, match="KFRA of 8 of 8 samples"):
        chunks.chunk_size(sizes, register(extensions.KFRA()), data[0], CLASSES, memory=1000)


def test_results_for_each_sample_count_for_the_whole_batch() -> None:
    images, _ = batch(nn.MSELoss(), 8)
    network = chain()
    _, sizes = chunks.run_once(backpack_network(network), images[:1])
    fixed, each = chunks.numbers_needed(sizes, extensions.BatchGrad(), CLASSES, 8)
    assert fixed == 2 * 8 * sum(p.numel() for p in network.parameters())
    assert chunks.chunk_size(sizes, extensions.BatchGrad(), images, CLASSES, memory=8 * (fixed + 2 * each)) == 2
    fixed, _ = chunks.numbers_needed(sizes, extensions.SqrtGGNExact(), CLASSES, 8)
    assert fixed == 2 * 8 * CLASSES * sum(p.numel() for p in network.parameters())
    fixed, _ = chunks.numbers_needed(sizes, register(extensions.KFRA()), CLASSES, 8)
    assert fixed == 3 * (4 * 36) ** 2  # four channels of 36 positions


def test_the_estimate_grows_with_what_a_quantity_propagates() -> None:
    _, sizes = chunks.run_once(backpack_network(chain(activation=nn.Tanh)), batch(nn.MSELoss(), 1)[0])
    first, mc, exact, root, hessian, hessian_mc = (
        sum(chunks.numbers_needed(sizes, make(), 10, 1))
        for make in (
            extensions.Variance,
            extensions.DiagGGNMC,
            extensions.DiagGGNExact,
            extensions.SqrtGGNExact,
            extensions.DiagHessian,
            DiagHessianMC,
        )
    )
    assert first == mc < exact < root
    assert exact < hessian_mc < hessian


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True])
def test_a_chunk_is_a_positive_whole_number(chunk: Any) -> None:
    with pytest.raises(InputError, match="must be a whole number of at least 1"):
        backpack_quantity(
            chain(), nn.CrossEntropyLoss(), batch(nn.CrossEntropyLoss(), 2), extensions.BatchGrad(), chunk=chunk
        )
