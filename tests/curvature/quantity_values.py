"""The extensions and losses of the tests of BackPACK quantities, and the comparison of what they give."""

from collections.abc import Callable
from typing import Any

import torch
from backpack import extensions
from backpack.extensions.backprop_extension import BackpropExtension
from small_networks import relative
from torch import Tensor, nn

from secondorder.curvature.backpack.diag_hessian_mc import BatchDiagHessianMC, DiagHessianMC
from secondorder.curvature.backpack.kronecker import WeightSharingKFAC, WeightSharingKFLR

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross-entropy": nn.CrossEntropyLoss,
    "cross-entropy, sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "squared error": nn.MSELoss,
    "squared error, sum": lambda: nn.MSELoss(reduction="sum"),
}
EXACT: list[Callable[[], BackpropExtension]] = [
    extensions.BatchGrad,
    extensions.BatchL2Grad,
    extensions.SumGradSquared,
    extensions.Variance,
    extensions.DiagGGNExact,
    extensions.BatchDiagGGNExact,
    extensions.SqrtGGNExact,
    extensions.DiagHessian,
    extensions.BatchDiagHessian,
    extensions.KFLR,
    WeightSharingKFLR,
    extensions.GGNMP,
    extensions.HMP,
]
RANDOM: list[Callable[[], BackpropExtension]] = [
    extensions.DiagGGNMC,
    extensions.BatchDiagGGNMC,
    extensions.SqrtGGNMC,
    extensions.KFAC,
    WeightSharingKFAC,
    DiagHessianMC,
    BatchDiagHessianMC,
]


def tensors(value: Any, shape: torch.Size) -> list[Tensor]:
    """The tensors of one parameter's quantity; of a product, what it gives for two fixed matrices."""
    if callable(value):
        return [value(torch.linspace(-1, 1, 2 * shape.numel(), dtype=torch.float64).view(2, *shape))]
    return list(value) if isinstance(value, list) else [value]


def assert_equal(a: dict[str, Any], b: dict[str, Any], network: nn.Module, tolerance: float = 1e-12) -> None:
    assert list(a) == list(b)
    assert a
    for name, parameter in network.named_parameters():
        pairs = zip(tensors(a[name], parameter.shape), tensors(b[name], parameter.shape), strict=True)
        for ours, theirs in pairs:
            assert ours.shape == theirs.shape
            assert relative(ours, theirs) <= tolerance, name
