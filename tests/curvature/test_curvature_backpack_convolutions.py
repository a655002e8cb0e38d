"""BackPACK quantities of convolutions of 1 to 3 dimensions, transposed ones and with groups, against autograd. float64."""

from collections.abc import Callable

import pytest
import torch
from backpack import extensions
from labelled_losses import drawn
from small_networks import relative
from torch import Tensor, nn

from secondorder.curvature import curvature_blocks
from secondorder.curvature.backpack.kronecker import WeightSharingKFAC, WeightSharingKFLR
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.errors import InputError

PLAIN: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "Conv1d": (lambda: [nn.Conv1d(2, 4, 2, stride=2, padding=1), nn.Tanh(), nn.Conv1d(4, 2, 2)], (2, 6)),
    "Conv1d, groups": (lambda: [nn.Conv1d(4, 4, 2, groups=2), nn.Tanh(), nn.Conv1d(4, 2, 1, groups=2)], (4, 4)),
    "Conv2d, groups": (lambda: [nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 1, groups=2)], (4, 3, 2)),
    "Conv3d": (lambda: [nn.Conv3d(2, 4, 2, padding=(1, 0, 0)), nn.Tanh(), nn.Conv3d(4, 2, 1)], (2, 2, 3, 2)),
    "Conv3d, groups": (lambda: [nn.Conv3d(4, 4, 2, groups=2), nn.Tanh(), nn.Conv3d(4, 2, 1, groups=2)], (4, 2, 3, 2)),
}
TRANSPOSED: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "1d": (lambda: [nn.ConvTranspose1d(4, 4, 2, groups=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 2)], (4, 3)),
    "2d": (lambda: [nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 1)], (4, 2, 2)),
    "3d": (lambda: [nn.ConvTranspose3d(4, 4, 2, groups=2), nn.Tanh(), nn.ConvTranspose3d(4, 2, 1)], (4, 1, 2, 1)),
}


def problem(make: Callable[[], list[nn.Module]], shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A network, a loss with class weights, images and labels at each position."""
    torch.manual_seed(0)
    network, images = nn.Sequential(*make()).double(), drawn(3, *shape, seed=1)
    labels = drawn(*network(images)[:, 0].shape, seed=2).gt(0).long()
    return network, nn.CrossEntropyLoss(torch.tensor([0.5, 2.0], dtype=torch.float64)), images, labels


@pytest.mark.parametrize("case", [*PLAIN.values(), *TRANSPOSED.values()], ids=[*PLAIN, *TRANSPOSED])
def test_norms_of_individual_gradients(case: tuple[Callable[[], list[nn.Module]], tuple[int, ...]]) -> None:
    """Those of convolutions with groups are the sums over the groups, in any number of dimensions."""
    network, loss, images, labels = problem(*case)
    gradients = backpack_quantity(network, loss, (images, labels), extensions.BatchGrad())
    total = torch.autograd.grad(loss(network(images), labels), [*network.parameters()])
    norms = backpack_quantity(network, loss, (images, labels), extensions.BatchL2Grad(), chunk=2)
    for (name, norm), gradient in zip(norms.items(), total, strict=True):
        assert relative(gradients[name].sum(0), gradient) <= 1e-12
        assert relative(norm, gradients[name].flatten(1).square().sum(1)) <= 1e-12, name


def dense(B: Tensor, *A: Tensor) -> Tensor:
    """B kron A, with a block for each group; B alone for a bias."""
    groups = zip(B, *A, strict=True) if B.ndim == 3 else [(B, *A)]
    return torch.block_diag(*(torch.kron(*pair) if A else pair[0] for pair in groups))


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_factors(case: str, sharing: str) -> None:
    """One definition for all convolutions, that of `curvature_blocks`."""
    network, loss, images, labels = problem(*PLAIN[case])
    truth = curvature_blocks(network, loss, (images, labels), f"kfac_{sharing}")
    for extension in [WeightSharingKFLR(sharing), *([extensions.KFLR()] if sharing == "expand" else [])]:
        found = backpack_quantity(network, loss, (images, labels), extension, chunk=2)
        for name, (B, *A) in found.items():
            block, whole = truth[name].dense(), dense(B, *A)
            assert float((whole - block).abs().max()) <= 1e-12 * float(block.abs().max()), name


@pytest.mark.parametrize("case", ["Conv1d", "Conv3d"])
def test_averages(case: str) -> None:
    """KFRA's factors of the last convolution are exactly those of K-FAC: nothing has been averaged yet."""
    network, loss, images, labels = problem(*PLAIN[case])
    kfra, kflr = (backpack_quantity(network, loss, (images, labels), e()) for e in (extensions.KFRA, extensions.KFLR))
    assert all(relative(a, b) <= 1e-12 for a, b in zip(kfra["2.weight"], kflr["2.weight"], strict=True))


@pytest.mark.parametrize("case", TRANSPOSED)
@pytest.mark.parametrize("extension", [WeightSharingKFAC, WeightSharingKFLR])
def test_transposed_convolutions_have_no_factors(case: str, extension: Callable[[], extensions.KFAC]) -> None:
    """BackPACK's know no weight sharing: they were the same for expand and reduce."""
    network, loss, images, labels = problem(*TRANSPOSED[case])
    with pytest.raises(InputError, match=rf"'0' \(ConvTranspose{case}\) has no row for {extension.__name__}"):
        backpack_quantity(network, loss, (images, labels), extension())
