"""BackPACK quantities of losses that BackPACK has no curvature for, against torch.func; and their chunks. float64."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from backpack import backpack, disable, extend, extensions
from backpack.extensions.backprop_extension import BackpropExtension
from labelled_losses import CASES, F64, D, N, drawn, segmentation
from quantity_values import EXACT, RANDOM, assert_equal
from small_networks import CLASSES, chain, relative, true_ggn, true_hessian
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import curvature_blocks
from secondorder.curvature.backpack.diag_hessian_mc import BatchDiagHessianMC, DiagHessianMC
from secondorder.curvature.backpack.kronecker import WeightSharingKFLR
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.curvature.backpack.registration import register
from secondorder.errors import InputError

Problem = tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, Tensor]]

SMALL_WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=F64)
LABELS = torch.tensor([0, 2, -100, 1, 1])
SINGLE: dict[str, tuple[Any, Tensor]] = {
    "class weights, ignored": (nn.CrossEntropyLoss(SMALL_WEIGHTS), LABELS),
    "ignored by number, smoothed": (nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1), LABELS.abs() % 3),
    "probabilities": (F.cross_entropy, drawn(5, CLASSES, seed=3).softmax(1)),
    "binary, weights": (nn.BCEWithLogitsLoss(pos_weight=SMALL_WEIGHTS), drawn(5, CLASSES, seed=3).sigmoid()),
    "binary, sum": (nn.BCEWithLogitsLoss(reduction="sum"), drawn(5, CLASSES, seed=3).sigmoid().round()),
    "squared error": (F.mse_loss, drawn(5, CLASSES, seed=3)),
}
SQUARED = {"squared error": (nn.MSELoss(), drawn(N, 3, *D, seed=3))}


def problem(case: str) -> Problem:
    """A segmentation for the losses with several labels, a network with a head for those of single ones."""
    torch.manual_seed(1)
    kind, _, name = case.partition(": ")
    if kind in ("gap", "gcp"):
        loss, labels = SINGLE[name]
        return chain(kind, nn.Tanh, channels=2), loss, (drawn(5, 2, 6, 6, seed=7), labels)
    loss, labels = (CASES | SQUARED)[name]
    return segmentation(), loss, (drawn(N, 2, *D, seed=7), labels)


PROBLEMS = pytest.mark.parametrize(
    "case",
    [
        *(f"segmentation: {name}" for name in (*CASES, *SQUARED)),
        *(f"gap: {name}" for name in SINGLE),
        "gcp: class weights, ignored",  # a head sees no more of a loss than its derivatives
    ],
)


def side_by_side(found: dict[str, Tensor], leading: int = 0) -> Tensor:
    return torch.cat([value.flatten(leading) for value in found.values()], -1)


def gradient(network: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, [*network.parameters()], retain_graph=True)])


def parts_of_samples(network: nn.Module, loss: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """What each sample adds to the loss: its own losses, over what the loss divides the sum of all by."""
    options = {}
    if isinstance(loss, nn.Module):
        names = ("weight", "pos_weight", "ignore_index", "label_smoothing")
        options = {name: getattr(loss, name) for name in names if hasattr(loss, name)}
    function = {
        nn.CrossEntropyLoss: F.cross_entropy,
        nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
        nn.MSELoss: F.mse_loss,
    }.get(type(loss), loss)
    own = function(network(batch[0]), batch[1], reduction="none", **options)
    with torch.no_grad():
        divisor = own.sum() / loss(network(batch[0]), batch[1])
    return [one.sum() / divisor for one in own]


@cache
def dense(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """The Gauss-Newton matrix, the Hessian, and the gradient of each sample's part."""
    network, loss, batch = problem(case)
    gradients = torch.stack([gradient(network, part) for part in parts_of_samples(network, loss, batch)])
    return true_ggn(network, loss, batch), true_hessian(network, loss, batch), gradients


@PROBLEMS
@pytest.mark.parametrize("chunk", [None, 2])
def test_exact_quantities(case: str, chunk: int | None) -> None:
    network, loss, batch = problem(case)
    ggn, hessian, gradients = dense(case)

    def quantity(extension: BackpropExtension) -> dict[str, Any]:
        return backpack_quantity(network, loss, batch, extension, chunk=chunk)

    assert relative(side_by_side(quantity(extensions.BatchGrad()), 1), gradients) <= 1e-11
    assert relative(side_by_side(quantity(extensions.SumGradSquared())), gradients.square().sum(0)) <= 1e-11
    assert relative(side_by_side(quantity(extensions.Variance())), gradients.var(0, unbiased=False)) <= 1e-11
    assert relative(side_by_side(quantity(extensions.DiagGGNExact())), ggn.diagonal()) <= 1e-11
    assert relative(side_by_side(quantity(extensions.BatchDiagGGNExact()), 1).sum(0), ggn.diagonal()) <= 1e-11
    rows = side_by_side(quantity(extensions.SqrtGGNExact()), 2).flatten(0, 1)
    assert relative(rows.mT @ rows, ggn) <= 1e-11
    assert relative(side_by_side(quantity(extensions.DiagHessian())), hessian.diagonal()) <= 1e-11
    assert relative(side_by_side(quantity(extensions.BatchDiagHessian()), 1).sum(0), hessian.diagonal()) <= 1e-11
    for extension, truth in ((extensions.GGNMP(), ggn), (extensions.HMP(), hessian)):
        first = 0
        for name, multiply in quantity(extension).items():
            shape = network.get_parameter(name).shape
            block = truth[first : first + shape.numel(), first : first + shape.numel()]
            V = drawn(2, *shape, seed=9)
            assert float((multiply(V).flatten(1) - V.flatten(1) @ block).abs().max() / truth.abs().max()) <= 1e-11
            first += shape.numel()


@PROBLEMS
def test_kronecker_factors_are_those_without_backpack(case: str) -> None:
    network, loss, batch = problem(case)
    for sharing in ("expand", "reduce"):
        truth = curvature_blocks(network, loss, batch, f"kfac_{sharing}")
        for chunk in (None, 2):
            factors = backpack_quantity(network, loss, batch, WeightSharingKFLR(sharing), chunk=chunk)
            for name, (B, *A) in factors.items():
                found, expected = torch.kron(B, *A) if A else B, truth[name].dense()
                assert float((found - expected).abs().max()) <= 1e-11 * max(float(expected.abs().max()), 1e-3)


@PROBLEMS
@pytest.mark.parametrize("extension", [e for e in RANDOM if e not in (DiagHessianMC, BatchDiagHessianMC)])
def test_drawn_labels_do_not_depend_on_chunks(case: str, extension: Callable[[], BackpropExtension]) -> None:
    """They are drawn sample after sample, so that a seed means one number whatever the memory is."""
    network, loss, batch = problem(case)
    whole, parts = (backpack_quantity(network, loss, batch, extension(), chunk=chunk, seed=3) for chunk in (None, 2))
    assert_equal(parts, whole, network)
    other = backpack_quantity(network, loss, batch, extension(), seed=4)
    with pytest.raises(AssertionError):
        assert_equal(other, whole, network)


@pytest.mark.parametrize("case", ["segmentation: weights, smoothing", "gap: binary, weights", "gap: squared error"])
def test_drawn_labels_have_the_curvature_as_their_mean(case: str) -> None:
    network, loss, batch = problem(case)
    truth = true_ggn(network, loss, batch)
    rows = side_by_side(backpack_quantity(network, loss, batch, extensions.SqrtGGNMC(mc_samples=4000), seed=0), 2)
    assert rows.shape[:2] == (4000, len(batch[0]))
    found = torch.einsum("vnp,vnq->pq", rows, rows)
    assert float((found - truth).norm() / truth.norm()) < 0.1


@pytest.mark.parametrize("extension", [extensions.SqrtGGNExact, extensions.SqrtGGNMC])
def test_some_samples_of_a_batch(extension: Callable[..., BackpropExtension]) -> None:
    network, loss, batch = problem("segmentation: weights, smoothing")
    whole, some = (
        backpack_quantity(network, loss, batch, extension(subsampling=chosen), seed=1) for chosen in (None, [3, 0])
    )
    for name, columns in some.items():
        torch.testing.assert_close(columns, whole[name][:, [3, 0]], rtol=1e-12, atol=1e-15)


def test_memory_counts_the_columns_of_all_outputs() -> None:
    """A segmentation's root has a column for each class at each position; the number is named where it does not fit."""
    network, loss, (images, labels) = problem("segmentation: classes")
    larger = images.repeat(1, 1, 3, 3), labels.repeat(1, 3, 3)
    needed = []
    for batch in ((images, labels), larger):
        with pytest.raises(InputError, match="SqrtGGNExact of 1 of 4 samples at a time") as caught:
            backpack_quantity(network, loss, batch, extensions.SqrtGGNExact(), memory=1)
        needed.append(float(re.findall(r"about (\S+) GiB", str(caught.value))[0]))
    assert needed[1] / needed[0] > 9


def test_averages_over_the_batch() -> None:
    """KFRA's factor at the outputs is the sum of the samples' Hessians of the loss."""
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    for name, (loss, labels) in SINGLE.items():
        batch = drawn(5, 4, seed=2), labels
        z = network(batch[0]).detach()
        M = torch.func.hessian(lambda z: loss(z, labels))(z)  # noqa: B023
        B = backpack_quantity(network, loss, batch, extensions.KFRA())["2.bias"][0]
        assert relative(B, sum(M[n, :, n] for n in range(5))) <= 1e-12, name


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("case", "known"),
    [
        ("segmentation: sum", nn.CrossEntropyLoss(reduction="sum")),
        ("segmentation: classes", nn.CrossEntropyLoss()),
        ("gap: squared error", nn.MSELoss()),
    ],
)
@pytest.mark.parametrize("extension", EXACT)
def test_equal_to_backpack_where_it_knows_the_loss(
    extension: Callable[[], BackpropExtension], case: str, known: nn.Module
) -> None:
    """Its own curvature of losses is not used, for outputs `[N, C, H, W]` neither."""
    network, loss, batch = problem(case)
    ours = backpack_quantity(network, loss, batch, extension())
    torch.set_default_dtype(F64)
    try:
        with backpack(register(extension())):
            extend(known)(extend(network)(batch[0]), batch[1]).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    theirs = {name: getattr(p, extension().savefield) for name, p in network.named_parameters()}
    with torch.no_grad():
        assert_equal(ours, theirs, network)


@pytest.mark.parametrize("name", ["probabilities", "binary, weights", "squared error"])
@pytest.mark.parametrize("extension", [extensions.BatchGrad, extensions.DiagGGNExact, extensions.HMP])
def test_graphs_of_the_batch_are_left_alone(name: str, extension: Callable[[], BackpropExtension]) -> None:
    """Targets and images that somebody else's parameters made: neither gets a gradient, and chunks can go back twice."""
    network, loss, (images, targets) = problem(f"gap: {name}")
    leaves = images.clone().requires_grad_(), targets.clone().requires_grad_()
    data = tuple(leaf * torch.ones(1, dtype=F64) for leaf in leaves)
    found = backpack_quantity(network, loss, data, extension(), chunk=2)
    assert all(leaf.grad is None for leaf in leaves)
    assert_equal(found, backpack_quantity(network, loss, (images, targets), extension()), network)
    with torch.inference_mode():
        data = images.clone(), targets.clone()
    assert_equal(found, backpack_quantity(network, loss, data, extension()), network)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Identity])
def test_averages_at_the_last_activation(activation: type[nn.Module]) -> None:
    """KFRA of outputs `[N, C, H, W]` that come from an activation: B = sum_t of the averaged J^T M J at equal positions."""
    network = nn.Sequential(nn.Conv2d(2, 3, 1), activation()).double()
    images, loss, labels = drawn(N, 2, *D, seed=7), *CASES["weights, smoothing"]
    y = network[0](images).detach()
    M = torch.func.hessian(lambda z: loss(z, labels))(network[1](y)).flatten(4).flatten(0, 3).view(N, 12, N, 12)
    J = torch.stack([torch.func.jacrev(network[1])(one).reshape(12, 12) for one in y])
    H = (J.mT @ sum(M[n, :, n] for n in range(N)) @ J).mean(0).view(3, 4, 3, 4)
    B = backpack_quantity(network, loss, (images, labels), extensions.KFRA())["0.weight"][0]
    assert relative(B, torch.einsum("itjt->ij", H)) <= 1e-12


def test_backpack_disabled() -> None:
    """A network of the user's that keeps no inputs is none of our business."""
    network, loss, batch = problem("gcp: class weights, ignored")
    with disable():
        found = backpack_quantity(network, loss, batch, extensions.DiagGGNExact())
        assert not disable.should_store_io()
    assert_equal(found, backpack_quantity(network, loss, batch, extensions.DiagGGNExact()), network)


@pytest.mark.parametrize("extension", EXACT)
@pytest.mark.parametrize("images_too", [False, True])
def test_channels_last(images_too: bool, extension: Callable[[], BackpropExtension]) -> None:
    """Kernels of 1 x 1, whose strides are both row-major and `channels_last`, among them."""
    network, loss, (images, labels) = problem("segmentation: weights, smoothing")
    expected = backpack_quantity(network, loss, (images, labels), extension())
    network.to(memory_format=torch.channels_last)
    kept = images.to(memory_format=torch.channels_last) if images_too else images
    strides = [p.stride() for p in network.parameters()]
    assert_equal(backpack_quantity(network, loss, (kept, labels), extension(), chunk=3), expected, network)
    assert strides == [p.stride() for p in network.parameters()]
