"""Gauss-Newton blocks of chosen parameters from the Jacobians of the outputs, with spectra worth of float64.

Index letters: N images, K outputs of each, P weights of a parameter. With J_n = dz_n / dw `[K, P]` and H_n the Hessian of the
loss at the outputs z_n, a block is G = sum_n J_n^T H_n J_n. Its small eigenvalues would drown in a Gram matrix of float32, so
that J and what is made of it are in float64, whatever the network computes in.

A block has at most r = min(P, N K) eigenvalues that are not zero, and r = min(P, N (K - 1)) with a softmax, whose logits may all
shift together. That number is the same for networks that differ in anything else, so that lambda_1 / lambda_k at k = r / 2
compares their conditioning at the same rank, without a threshold.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secondorder.accelerator import check_float64
from secondorder.curvature.blocks import curvature_blocks
from secondorder.curvature.matrix_free.batches import checked_tensors
from secondorder.curvature.matrix_free.frozen_network import FrozenNetwork
from secondorder.curvature.matrix_free.gauss_newton import GaussNewtonOperator
from secondorder.curvature.matrix_free.loss_curvature import KNOWN, Loss, loss_curvature, loss_name
from secondorder.curvature.matrix_free.separable_losses import SeparableLoss
from secondorder.curvature.operators import FactoredOperator
from secondorder.errors import InputError, check_known, check_whole

RESOLVED = 1e-12
"""Eigenvalues below this share of the largest are rounding errors."""


@dataclass(frozen=True)
class OutputJacobians:
    """Outputs z `[N, K]` of a network, and dz / dw `[N, K, P]` of parameters by name, in float64."""

    outputs: Tensor
    jacobians: Mapping[str, Tensor]

    def gauss_newton(self, name: str, loss: Loss | None = None, labels: Tensor | None = None) -> FactoredOperator:
        """J^T H J `[P, P]` of a parameter, in float64, as rows F^T J `[N R, P]` with H = F F^T the loss's Hessian at the outputs.

        Args:
            name: of a parameter with a Jacobian.
            loss: one whose H has a closed form (cross-entropy, squared error); None: J^T J, as of sum |z - y|^2 / 2.
            labels: of the N images, given exactly when there is a loss.

        Raises:
            InputError: for another name or loss, and for labels that do not fit.
        """
        check_known("parameter with a Jacobian", name, self.jacobians)
        J = self.jacobians[name]
        if (loss is None) != (labels is None):
            raise InputError("a loss and its labels go together; give both, or none for J^T J")
        if loss is not None and labels is not None:
            curvature = loss_curvature(loss, self.outputs.shape, labels, self.outputs.dtype)
            if not isinstance(curvature, SeparableLoss):
                raise InputError(f"{loss_name(loss)} has no H = F F^T in closed form; use {KNOWN}")
            J = curvature.root(self.outputs).mT @ J  # F^T J
        return FactoredOperator(J.flatten(0, 1))

    def rank(self, name: str, *, softmax: bool = True) -> int:
        """r = min(P, N K), with `softmax` min(P, N (K - 1)): the largest rank that the block of a parameter can have.

        Raises InputError for the name of a parameter without a Jacobian.
        """
        check_known("parameter with a Jacobian", name, self.jacobians)
        N, K, P = self.jacobians[name].shape
        return min(P, N * (K - softmax))


def output_jacobians(network: nn.Module, images: Tensor, params: Iterable[str]) -> OutputJacobians:
    """dz / dw `[N, K, P]` of the named parameters at images `[N, ...]`, and the outputs z `[N, K]`, in float64, all held at once.

    The network is evaluated in its present mode and number format, and left as it is, bit for bit. In training mode the
    statistics of batch norm are those of the images and are differentiated.

    Args:
        network: any network.
        images: `[N, ...]`.
        params: names of parameters.

    Raises:
        InputError: as `curvature_blocks`.
    """
    frozen = FrozenNetwork(network, params)
    check_float64(frozen.device, "output_jacobians")
    images, _ = checked_tensors((images, images), frozen)
    try:
        with torch.no_grad():
            z = frozen.outputs(images)
    except RuntimeError:  # of a derivative within the network
        with torch.enable_grad():
            z = frozen.outputs(images).detach()
    images.requires_grad_(frozen.differentiates_images)
    squared = nn.MSELoss(reduction="sum")  # its Gauss-Newton matrix is 2 J^T J
    blocks = curvature_blocks(network, squared, (images, torch.zeros_like(z)), "ggn", frozen.weights)
    assert isinstance(blocks.whole, GaussNewtonOperator)
    rows = blocks.whole.rows().unflatten(0, z.shape).split([block.size for block in blocks.values()], 2)
    return OutputJacobians(z.double(), {name: J.double() / 2**0.5 for name, J in zip(blocks, rows, strict=True)})


def half_rank_condition(eigenvalues: Tensor, rank: int) -> float:
    """lambda_1 / lambda_k at k = rank / 2, rounded up, of eigenvalues `[P]`, in any order, of a positive semi-definite matrix.

    Infinite where lambda_k is that of rounding, and nan for the zero matrix. Raises InputError for a rank that is no whole number
    from 1 to the number of eigenvalues.
    """
    check_whole("rank", rank, 1, len(eigenvalues))
    values = eigenvalues.sort(descending=True).values
    largest, half = float(values[0]), float(values[(rank + 1) // 2 - 1])
    if not largest > 0:
        return math.nan
    return largest / half if half > RESOLVED * largest else math.inf
