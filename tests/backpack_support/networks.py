"""Whole networks in the support matrix: quantities that are run and compared at a few parameters.

Index letters: N samples, K outputs, P entries of one parameter, J `[N, K, P]` the outputs' Jacobian, M `[N, K, K]` the
Hessian of the mean cross-entropy at the outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from secondorder.networks import network

from .kronecker_reference import true_blocks
from .reference import as_tensor

IMAGE_SIZES = {"cifar_resnet8": 8, "resnet18": 32, "mobilenet_v2": 64, "shufflenet_v2_x0_5": 64}
"""Backbone -> side of the images: the smallest that leave a covariance more than one position."""

HEADS: dict[str, dict[str, int]] = {"gap": {}, "gcp": {"reduced_channels": 4}}
NETWORKS = [f"{backbone}, {head}" for backbone in IMAGE_SIZES for head in HEADS]


@dataclass(frozen=True)
class Case:
    """A network with the batch of two images on which it is run."""

    network: nn.Module
    images: Tensor
    labels: Tensor

    def spots(self) -> list[str]:
        """The parameters that are looked at: the first normalisation's weight, and the classifier's bias."""
        names = [name for name, p in self.network.named_parameters() if p.dim() == 1]
        return [names[0], names[-1]]


@cache
def network_case(name: str) -> Case:
    """The network called ``backbone, head`` for two classes, in float64 and eval mode."""
    backbone, head = name.split(", ")
    size = IMAGE_SIZES[backbone]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = network(backbone, head, 2, **HEADS[head]).double().eval()
        return Case(made, torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([0, 1]))


def gauss_newton(case: Case, name: str) -> Tensor:
    """J_n^T M_n J_n `[N, P, P]`, by autograd."""
    outputs = case.network(case.images)
    p = outputs.detach().softmax(1)
    M = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(p)
    J = rows(outputs.flatten(), case, name).unflatten(0, outputs.shape)
    return J.mT @ M @ J


def rows(values: Tensor, case: Case, name: str) -> Tensor:
    """The gradient of each value `[R]` with respect to the parameter `[R, P]`."""
    parameter = case.network.get_parameter(name)
    return torch.stack([torch.autograd.grad(value, parameter, retain_graph=True)[0].flatten() for value in values])


def error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|."""
    return float((found - expected).abs().max() / expected.abs().max())


def diagonal_error(case: Case, found: dict[str, Any]) -> float:
    """That of the diagonal at the spots."""
    expected = {name: gauss_newton(case, name).sum(0).diagonal() for name in case.spots()}
    return max(error(found[name].flatten(), diagonal) for name, diagonal in expected.items())


def kronecker_error(case: Case, found: dict[str, Any]) -> float:
    """That of the blocks of the first layer with a small one, and of the classifier where its own is small."""
    small = [name for name in found if case.network.get_parameter(name).numel() <= 1000]
    names = [small[0], *small[-2:]]
    expected = true_blocks(case.network, nn.CrossEntropyLoss(), (case.images, case.labels), names)["expand"]
    shapes = {name: case.network.get_parameter(name).shape for name in names}
    return max(error(as_tensor(found[name], shapes[name], expected[name]), expected[name]) for name in names)


SPOT_CHECKS: dict[str, Callable[[Case, dict[str, Any]], float]] = {
    "DiagGGNExact": diagonal_error,
    "KFLR": kronecker_error,
}
"""Quantity -> its relative error at the spots of a network; one quantity of each kind, for these networks take their time."""
