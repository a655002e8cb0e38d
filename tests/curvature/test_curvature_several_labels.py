"""Losses with several labels for each sample, and sums over samples of one's own, against derivatives by torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature import SumOverSamples, curvature_blocks
from secondorder.curvature.matrix_free.loss_curvature import AnyLoss, loss_curvature
from secondorder.curvature.matrix_free.separable_losses import SeparableLoss
from secondorder.errors import InputError

N, C, D = 4, 3, (2, 2)
F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


CLASSES = drawn(N, *D, seed=1).mul(3).long().abs() % C
IGNORED = CLASSES.clone().index_fill_(0, torch.tensor([1]), -100)
SHARES = drawn(N, C, *D, seed=2).softmax(1)
TARGETS = drawn(N, C, *D, seed=3).sigmoid()
WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
CASES: dict[str, tuple[Any, Tensor]] = {
    "classes": (nn.CrossEntropyLoss(), CLASSES),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "ignored": (nn.CrossEntropyLoss(), IGNORED),
    "weights, smoothing": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.2), IGNORED),
    "probabilities": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), SHARES),
    "function": (F.cross_entropy, CLASSES),
    "binary": (nn.BCEWithLogitsLoss(), TARGETS),
    "binary sum": (nn.BCEWithLogitsLoss(reduction="sum"), TARGETS.round()),
    "binary weights": (nn.BCEWithLogitsLoss(weight=WEIGHTS[:, None, None], pos_weight=WEIGHTS[:2]), TARGETS),
    "binary function": (F.binary_cross_entropy_with_logits, TARGETS),
}
LABELLED = pytest.mark.parametrize("case", CASES)


def of(case: str) -> tuple[SeparableLoss, Tensor, Tensor]:
    """The loss in closed form, outputs flattened, and its Hessian `[N, K, N, K]` by torch."""
    loss, labels = CASES[case]
    shape = torch.Size([N, C, *D])
    made = loss_curvature(loss, shape, labels, F64)
    assert isinstance(made, SeparableLoss)
    z = drawn(N, C * D[0] * D[1], seed=4)
    truth = torch.func.hessian(lambda z: loss(z.view(shape), labels))(z)
    torch.testing.assert_close(made.value(z), loss(z.view(shape), labels), rtol=1e-12, atol=0)
    return made, z, truth


@LABELLED
def test_the_hessian_is_that_of_torch(case: str) -> None:
    made, z, truth = of(case)
    root, U = made.root(z), drawn(*z.shape, seed=5)
    blocks = torch.stack([truth[n, :, n] for n in range(N)])
    assert float(truth.abs().sum() - blocks.abs().sum()) < 1e-12  # block diagonal
    torch.testing.assert_close(root @ root.mT, blocks, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(made.product(z, U), (blocks @ U[..., None])[..., 0], rtol=1e-12, atol=1e-15)
    assert torch.equal(made.root(z, slice(3, 8)), root[..., 3:8])
    torch.testing.assert_close(made.part(slice(1, 3)).root(z[1:3]), root[1:3])
    whole = made.value(z)
    torch.testing.assert_close(sum(made.part(rows).value(z[rows]) for rows in (slice(0, 1), slice(1, 4))), whole)


@LABELLED
def test_drawn_labels_have_the_hessian_as_their_mean(case: str) -> None:
    made, z, truth = of(case)
    noise = made.noise(20_000, torch.Generator().manual_seed(6))
    columns = made.sampled(z, noise)
    assert torch.equal(made.part(slice(2, 4)).sampled(z[2:], noise[2:]), columns[2:])
    for n in range(N):
        error = (columns[n] @ columns[n].T - truth[n, :, n]).abs().max()
        assert error < 0.05 * max(float(truth[n, :, n].abs().max()), 1e-9)


def test_the_given_labels_in_place_of_drawn_ones() -> None:
    """Uniform numbers that draw the given labels: the column of the empirical Fisher is the drawn one."""
    for case in ("classes", "sum", "ignored", "binary sum"):
        made, z, _ = of(case)
        labels = CASES[case][1]
        if "binary" in case:
            noise = (1 - labels).reshape(N, -1, 1)
        else:
            p = z.view(N, C, -1).softmax(1)
            ends = torch.cat([p.new_zeros(N, 1, p.shape[2]), p.cumsum(1)], 1)
            y = labels.clamp_min(0).reshape(N, 1, -1)
            noise = ((ends.gather(1, y) + ends.gather(1, y + 1)) / 2)[:, 0, :, None]
        torch.testing.assert_close(made.gradients(z), made.sampled(z, noise), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", ["classes", "sum", "function", "binary", "binary sum", "binary function"])
def test_gradients_are_those_of_the_loss(case: str) -> None:
    """With equal shares s of the labels the column times sqrt(s) is dL/dz."""
    made, z, _ = of(case)
    gradient = torch.func.grad(made.value)(z)
    share = (made.gradients(z)[..., 0] / gradient).square()
    labels = CASES[case][1].numel()
    torch.testing.assert_close(
        1 / share, torch.full_like(share, 1.0 if "sum" in case else 1 / labels), rtol=1e-9, atol=0
    )


def segmentation() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, C, 1)).double()


def dense(network: nn.Module, loss: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """J^T M J by torch."""
    names, shapes = zip(*((name, p.shape) for name, p in network.named_parameters()), strict=True)
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])

    def outputs(w: Tensor) -> Tensor:
        parts = w.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, shape, part in zip(names, shapes, parts, strict=True)}
        return torch.func.functional_call(network, weights, (batch[0],))

    z = outputs(flat).detach()
    J = torch.func.jacrev(outputs)(flat).flatten(0, -2)
    M = torch.func.hessian(lambda u: loss(u.view_as(z), batch[1]))(z.flatten())
    return J.T @ M @ J


@LABELLED
def test_quantities_of_a_segmentation(case: str) -> None:
    loss, labels = CASES[case]
    network, batch = segmentation(), (drawn(N, 2, *D, seed=7), labels)
    truth = dense(network, loss, batch)
    for chunk in (None, 3):
        ggn = curvature_blocks(network, loss, batch, "ggn", chunk=chunk).whole
        torch.testing.assert_close(ggn.dense(), truth, rtol=1e-10, atol=1e-14)
    diagonal = curvature_blocks(network, loss, batch, "diagonal", chunk=1).whole
    torch.testing.assert_close(diagonal.diagonal(), truth.diagonal(), rtol=1e-10, atol=1e-14)
    whole, parts = (
        curvature_blocks(network, loss, batch, quantity, chunk=chunk).whole @ torch.ones(len(truth), dtype=F64)
        for quantity, chunk in (("kfac_expand", None), ("kfac_expand", 2))
    )
    torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-14)
    seen = curvature_blocks(network, loss, batch, "mc_fisher", samples=3000, seed=1).whole.dense()
    assert float((seen - truth).norm() / truth.norm()) < 0.1


def test_kfac_of_one_sample_and_one_layer_is_exact() -> None:
    network = nn.Linear(5, 4).double()
    batch = drawn(1, 5), drawn(1, 4, seed=2).sigmoid()
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=F64))
    exact, kfac = (curvature_blocks(network, loss, batch, quantity, ["weight"]) for quantity in ("ggn", "kfac_expand"))
    torch.testing.assert_close(kfac["weight"].dense(), exact["weight"].dense(), rtol=1e-10, atol=1e-14)


def pairwise(z: Tensor, y: Tensor) -> Tensor:
    return (z.exp().sum(1).log1p() * y).sum() / 7


def test_a_sum_of_ones_own_is_divided() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = drawn(6, 5), drawn(6, seed=8).abs()
    truth = dense(network, pairwise, batch)
    for quantity in ("ggn", "hessian"):
        whole, parts = (
            curvature_blocks(network, loss, batch, quantity, chunk=chunk).whole.dense()
            for loss, chunk in ((pairwise, None), (SumOverSamples(pairwise), 4))
        )
        torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-15)
        if quantity == "ggn":
            torch.testing.assert_close(parts, truth, rtol=1e-11, atol=1e-15)
    with pytest.raises(InputError, match="`SumOverSamples` says so of one"):
        curvature_blocks(network, pairwise, batch, "ggn", chunk=4)
    with pytest.raises(InputError, match="no sum over samples; divide a sum by a number of your own"):
        curvature_blocks(network, SumOverSamples(lambda z, y: pairwise(z, y) / len(z)), batch, "ggn", chunk=4)


def test_targets_beyond_0_and_1_have_products_alone() -> None:
    network, batch = nn.Linear(5, 4).double(), (drawn(3, 5), 3 * drawn(3, 4, seed=2))
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.full((4,), 2.0, dtype=F64))
    assert isinstance(loss_curvature(loss, torch.Size([3, 4]), batch[1], F64), AnyLoss)
    found = curvature_blocks(network, loss, batch, "ggn").whole
    torch.testing.assert_close(found.dense(), dense(network, loss, batch), rtol=1e-10, atol=1e-14)
    with pytest.raises(InputError, match="'diagonal' needs"):
        curvature_blocks(network, loss, batch, "diagonal")


@pytest.mark.parametrize("places", [(), D])
def test_probabilities_below_0_have_products_alone(places: tuple[int, ...]) -> None:
    """As weights of either sign on the classes have (advantages of a policy): the loss is not convex."""
    network = segmentation() if places else nn.Linear(5, C).double()
    batch = drawn(N, 2, *places, seed=7) if places else drawn(N, 5, seed=7), drawn(N, C, *places, seed=2)
    truth = dense(network, nn.CrossEntropyLoss(), batch)
    assert float(torch.linalg.eigvalsh(truth)[0]) < -1e-3
    found = curvature_blocks(network, nn.CrossEntropyLoss(), batch, "ggn").whole
    torch.testing.assert_close(found.dense(), truth, rtol=1e-10, atol=1e-14)
    for quantity in ("diagonal", "mc_fisher", "empirical_fisher", "kfac_expand"):
        with pytest.raises(InputError, match=f"{quantity!r} needs .* not CrossEntropyLoss of such targets"):
            curvature_blocks(network, nn.CrossEntropyLoss(), batch, quantity)


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        (nn.CrossEntropyLoss(), torch.zeros(N, 2, dtype=torch.int64), r"needs class indices \[4, 2, 2\]"),
        (nn.CrossEntropyLoss(), torch.zeros(N, C, 2), r"class probabilities \[4, 3, 2, 2\]"),
        (nn.CrossEntropyLoss(), torch.full((N, *D), C), "label 3 is out of range"),
        (nn.CrossEntropyLoss(), torch.full((N, *D), -100), "no label counts"),
        (nn.CrossEntropyLoss(reduction="none"), CLASSES, "has reduction 'none'"),
        (nn.BCEWithLogitsLoss(), CLASSES, "binary cross-entropy needs equal shapes and floating-point targets"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(5)), TARGETS, r"pos_weight of shape \[5\]"),
        (nn.BCEWithLogitsLoss(), TARGETS * torch.nan, "contain NaN or infinity"),
    ],
)
def test_labels_that_do_not_fit(loss: nn.Module, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loss_curvature(loss, torch.Size([N, C, *D]), labels, F64)
