"""Losses with several labels for each sample, and sums over samples of one's own, against derivatives by torch."""

import pytest
import torch
from labelled_losses import CASES, CLASSES, F64, LABELLED, TARGETS, C, D, N, drawn, segmentation
from small_networks import true_ggn
from torch import Tensor, nn

from secondorder.curvature import SumOverSamples, curvature_blocks
from secondorder.curvature.matrix_free.loss_curvature import AnyLoss, loss_curvature
from secondorder.curvature.matrix_free.separable_losses import SeparableLoss
from secondorder.errors import InputError


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


@LABELLED
def test_quantities_of_a_segmentation(case: str) -> None:
    loss, labels = CASES[case]
    network, batch = segmentation(), (drawn(N, 2, *D, seed=7), labels)
    truth = true_ggn(network, loss, batch)
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
    seen = curvature_blocks(network, loss, batch, "mc_fisher", samples=800, seed=1).whole.dense()
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
    truth = true_ggn(network, pairwise, batch)
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
    torch.testing.assert_close(found.dense(), true_ggn(network, loss, batch), rtol=1e-10, atol=1e-14)
    with pytest.raises(InputError, match="'diagonal' needs"):
        curvature_blocks(network, loss, batch, "diagonal")


@pytest.mark.parametrize("places", [(), D])
def test_probabilities_below_0_have_products_alone(places: tuple[int, ...]) -> None:
    """As weights of either sign on the classes have (advantages of a policy): the loss is not convex."""
    network = segmentation() if places else nn.Linear(5, C).double()
    batch = drawn(N, 2, *places, seed=7) if places else drawn(N, 5, seed=7), drawn(N, C, *places, seed=2)
    truth = true_ggn(network, nn.CrossEntropyLoss(), batch)
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
