"""Closed forms of the losses against autograd, Monte-Carlo columns in expectation, and labels that do not fit."""

import math

import pytest
import torch
from small_networks import relative
from torch import Tensor, nn
from torch.nn import functional as F

from secondorder.curvature.matrix_free.loss_curvature import AnyLoss, loss_curvature
from secondorder.curvature.matrix_free.separable_losses import SeparableLoss
from secondorder.errors import InputError

N, K = 5, 4
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=torch.float64)
CROSS_ENTROPIES: list[dict[str, object]] = [
    {},
    {"reduction": "sum"},
    {"weight": WEIGHT},
    {"label_smoothing": 0.2},
    {"ignore_index": 1},
    {"weight": WEIGHT, "label_smoothing": 0.3, "ignore_index": 2},
    {"weight": WEIGHT, "label_smoothing": 0.3, "reduction": "sum"},
]


def cases() -> list[tuple[nn.Module, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    classes = torch.tensor([0, 1, 2, 3, 1])
    probabilities = torch.rand(N, K, generator=generator, dtype=torch.float64)
    return [
        *[(nn.CrossEntropyLoss(**options), classes) for options in CROSS_ENTROPIES],
        *[
            (nn.CrossEntropyLoss(**options), probabilities)
            for options in CROSS_ENTROPIES
            if "ignore_index" not in options
        ],
        (nn.MSELoss(), probabilities),
        (nn.MSELoss(reduction="sum"), probabilities),
    ]


def made(loss: nn.Module, labels: Tensor) -> SeparableLoss:
    curvature = loss_curvature(loss, torch.Size([N, K]), labels, torch.float64)
    assert isinstance(curvature, SeparableLoss)
    return curvature


def true_matrix(loss: nn.Module, z: Tensor, labels: Tensor) -> Tensor:
    return torch.func.hessian(lambda z: loss(z, labels))(z).view(N * K, N * K)


def block_matrix(columns: Tensor) -> Tensor:
    return torch.block_diag(*(columns @ columns.mT))


@pytest.mark.parametrize(("loss", "labels"), cases())
def test_value_product_and_root_equal_autograd(loss: nn.Module, labels: Tensor) -> None:
    z, U = torch.randn(2, N, K, dtype=torch.float64)
    curvature, H = made(loss, labels), true_matrix(loss, z, labels)
    assert relative(curvature.value(z), loss(z, labels)) <= 1e-14
    assert relative(curvature.product(z, U).flatten(), H @ U.flatten()) <= 1e-13
    assert relative(block_matrix(curvature.root(z)), H) <= 1e-13
    assert relative(AnyLoss(loss, labels, z.shape).product(z, U).flatten(), H @ U.flatten()) <= 1e-13


@pytest.mark.parametrize(("loss", "labels"), cases())
def test_gradient_columns_are_the_losses_gradients_over_the_roots_of_the_shares(
    loss: nn.Module, labels: Tensor
) -> None:
    z = torch.randn(N, K, dtype=torch.float64, requires_grad=True)
    curvature = made(loss, labels)
    gradient = torch.autograd.grad(loss(z, labels), z)[0]
    shares = torch.tensor({"mean": 1 / N, "sum": 1.0}[loss.reduction], dtype=torch.float64)
    if isinstance(loss, nn.CrossEntropyLoss):  # M_n = s_n (diag p - p p^T), seen at its first entry
        p, first = z.detach().softmax(-1)[:, 0], [n * K for n in range(N)]
        shares = true_matrix(loss, z.detach(), labels)[first, first][:, None] / (p - p.square())[:, None]
    columns = curvature.gradients(z.detach())[..., 0]
    torch.testing.assert_close(columns * shares.sqrt(), gradient, rtol=1e-10, atol=1e-15)
    assert bool((columns[(gradient == 0).all(1)] == 0).all())


@pytest.mark.parametrize(("loss", "labels"), [cases()[0], cases()[5], cases()[-1]])
def test_monte_carlo_columns_are_unbiased(loss: nn.Module, labels: Tensor) -> None:
    z, S = torch.randn(N, K, dtype=torch.float64), 20_000
    curvature = made(loss, labels)
    columns = curvature.sampled(z, curvature.noise(S, torch.Generator().manual_seed(1))) * math.sqrt(S)
    draws = torch.einsum("nks,nls->nkls", columns, columns)
    error = draws.mean(-1) - torch.stack([b @ b.mT for b in curvature.root(z)])
    standard_error = draws.std(-1) / math.sqrt(S)
    assert float((error.abs() / standard_error.clamp_min(1e-12)).max()) <= 4
    assert float(error.abs().max()) > 0


@pytest.mark.parametrize(("loss", "labels"), cases())
def test_parts_of_a_batch_add_up(loss: nn.Module, labels: Tensor) -> None:
    z = torch.randn(N, K, dtype=torch.float64)
    curvature = made(loss, labels)
    first, rest = slice(0, 2), slice(2, N)
    value = curvature.part(first).value(z[first]) + curvature.part(rest).value(z[rest])
    assert relative(value, curvature.value(z)) <= 1e-14
    noise = curvature.noise(3, torch.Generator().manual_seed(2))
    parts = [curvature.part(rows).sampled(z[rows], noise[rows]) for rows in (first, rest)]
    assert torch.equal(torch.cat(parts), curvature.sampled(z, noise))
    assert torch.equal(torch.cat([curvature.part(rows).root(z[rows]) for rows in (first, rest)]), curvature.root(z))


def test_functions_of_torch_are_known_and_changed_losses_are_not() -> None:
    class Doubled(nn.CrossEntropyLoss):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return 2 * super().forward(z, y)

    labels = torch.tensor([0, 1, 2, 3, 1])
    assert isinstance(made(F.cross_entropy, labels), SeparableLoss)
    assert isinstance(made(F.mse_loss, torch.randn(N, K, dtype=torch.float64)), SeparableLoss)
    doubled = loss_curvature(Doubled(), torch.Size([N, K]), labels, torch.float64)
    assert isinstance(doubled, AnyLoss)
    z = torch.randn(N, K, dtype=torch.float64)
    assert relative(doubled.value(z), 2 * F.cross_entropy(z, labels)) <= 1e-15


def test_a_loss_that_is_called_otherwise_than_by_its_forward_is_another() -> None:
    class Called(nn.MSELoss):
        def __call__(self, z: Tensor, y: Tensor) -> Tensor:
            return 3 * super().__call__(z, y)

    y, z = torch.randn(N, K, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)
    called = loss_curvature(Called(), torch.Size([N, K]), y, torch.float64)
    assert isinstance(called, AnyLoss)
    assert relative(called.product(z, z), 6 * z / z.numel()) <= 1e-14


def test_extreme_logits_stay_finite() -> None:
    z = torch.tensor([[1e4, -1e4, 0.0, 3.0]] * N, dtype=torch.float64)
    curvature = made(nn.CrossEntropyLoss(), torch.tensor([0, 1, 2, 3, 0]))
    assert torch.isfinite(curvature.root(z)).all()
    columns = curvature.sampled(z, curvature.noise(7, torch.Generator().manual_seed(0)))
    assert torch.equal(columns, torch.zeros_like(columns))  # the model is certain of class 0


@pytest.mark.parametrize(
    ("loss", "labels", "message"),
    [
        (nn.CrossEntropyLoss(), torch.tensor([0, 1, 4, 0, 0]), r"label 4 is out of range.*0\.\.3"),
        (nn.CrossEntropyLoss(), torch.tensor([0, -1, 2, 0, 0]), "label -1 is out of range"),
        (nn.CrossEntropyLoss(), torch.zeros(N), r"class probabilities of shape \[5\]"),
        (nn.CrossEntropyLoss(), torch.zeros(N, dtype=torch.int32), r"torch\.int32.*class indices \[5\]"),
        (nn.CrossEntropyLoss(), torch.zeros(N, 1, dtype=torch.int64), r"labels of shape \[5, 1\]"),
        (nn.CrossEntropyLoss(), torch.full((N,), -100), "all are ignored"),
        (nn.CrossEntropyLoss(reduction="none"), torch.zeros(N, dtype=torch.int64), "reduction 'none'"),
        (nn.MSELoss(), torch.zeros(N), r"targets of shape \[5\].*outputs \[5, 4\]"),
        (nn.MSELoss(), torch.zeros(N, K, dtype=torch.int64), "floating-point targets"),
        (nn.MSELoss(), torch.full((N, K), math.nan), "NaN"),
        (nn.MSELoss(reduction="none"), torch.zeros(N, K), "reduction 'none'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(loss: nn.Module, labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loss_curvature(loss, torch.Size([N, K]), labels, torch.float64)
