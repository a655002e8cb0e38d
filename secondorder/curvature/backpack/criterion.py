"""The loss as the last module that BackPACK walks, with the curvature of `separable_losses` in place of BackPACK's.

BackPACK knows cross-entropy without class weights and ignored labels, and divides a chunk's mean by the chunk's samples. A
criterion has its labels and the divisor of the whole batch inside, so that the losses of chunks add up to that of the batch.

Index letters: N samples, outputs z `[N, *out]` of K numbers a sample, V columns or vectors. M is the Hessian of the loss at z.
"""

from collections.abc import Callable
from typing import Any

import torch
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor
from torch.nn.modules.loss import _Loss

from secondorder.curvature.backpack.kinds import Kind, kind_of, mc_samples, subsampling
from secondorder.curvature.backpack.rows import Product
from secondorder.curvature.matrix_free.loss_curvature import KNOWN, Loss, known, loss_curvature, loss_name
from secondorder.curvature.matrix_free.separable_losses import SeparableLoss
from secondorder.errors import InputError, short


class Criterion(_Loss):  # by this base class BackPACK tells that nothing comes after it
    """L(z) of outputs z `[N, *out]`: a loss at fixed labels, of the whole batch or of a part of it."""

    loss: SeparableLoss

    def __init__(self, loss: SeparableLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Tensor) -> Tensor:
        """The loss of outputs `[N, *out]`, a scalar."""
        return self.loss.value(outputs.flatten(1))


def check_loss(loss: Loss) -> None:
    """InputError for a loss whose curvature is not known in closed form."""
    if isinstance(loss, type):
        raise InputError(f"loss {loss.__name__} is a class; pass an instance: {loss.__name__}()")
    if not known(loss):
        raise InputError(
            f"loss {short(loss)}: must be {KNOWN}, without a forward or hooks of its own and weights that require gradients; for "
            "other losses use curvature_blocks, which is matrix-free"
        )


def loss_of(loss: Loss, shape: torch.Size, targets: Tensor, dtype: torch.dtype) -> SeparableLoss:
    """The loss at these targets for outputs of this shape. InputError for targets that do not fit, and where M has no root."""
    made = loss_curvature(loss, shape, targets, dtype)
    if not isinstance(made, SeparableLoss):
        raise InputError(
            f"{loss_name(loss)} is not convex at these targets, which lie outside [0, 1] or have weights below 0; use "
            "curvature_blocks(..., 'hessian')"
        )
    return made


class CriterionRow(ModuleExtension):
    """The row of a criterion: what each kind of quantity begins with."""

    def __init__(self) -> None:
        super().__init__(params=[])

    def backpropagate(
        self, extension: BackpropExtension, module: Any, g_inp: tuple, g_out: tuple, quantity: None
    ) -> Any:
        """The quantity at the outputs."""
        kind = kind_of(extension)
        assert kind is not None  # only second-order extensions propagate
        return BEGINNING[kind](extension, module.loss, module.input0.detach())


def _square_root(extension: BackpropExtension, loss: SeparableLoss, z: Tensor) -> Tensor:
    """S `[V, N, *out]` with S S^T = M, of all samples or those of the extension's subsampling.

    Monte-Carlo columns come from the random state of the CPU, sample after sample: the same on any device, for any chunks.
    """
    flat, samples = z.flatten(1), mc_samples(extension)
    columns = loss.root(flat) if samples is None else loss.sampled(flat, loss.noise(samples, torch.default_generator))
    S = columns.permute(2, 0, 1).unflatten(2, z.shape[1:])
    chosen = subsampling(extension)
    return S if chosen is None else S[:, chosen]


def _average(extension: BackpropExtension, loss: SeparableLoss, z: Tensor) -> Tensor:
    """sum_n M_n `[K, K]`, which for a mean is the average of the samples' own."""
    flat = z.flatten(1)
    total = z.new_zeros(flat.shape[1], flat.shape[1])
    for n in range(len(z)):
        (F,) = loss.part(slice(n, n + 1)).root(flat[n : n + 1])
        total.addmm_(F, F.T)
    return total


def _hessian_factors(extension: BackpropExtension, loss: SeparableLoss, z: Tensor) -> dict[str, list]:
    """S as factors with the sign +1: the loss is convex."""
    return {"matrices": [_square_root(extension, loss, z)], "signs": [1.0]}


def _product(extension: BackpropExtension, loss: SeparableLoss, z: Tensor) -> Product:
    """V -> M V for V `[V, N, *out]`."""
    return lambda V: torch.stack([loss.product(z.flatten(1), v.flatten(1)) for v in V]).view_as(V)


BEGINNING: dict[Kind, Callable[[BackpropExtension, SeparableLoss, Tensor], Any]] = {
    Kind.SQUARE_ROOT: _square_root,
    Kind.AVERAGE: _average,
    Kind.HESSIAN_FACTORS: _hessian_factors,
    Kind.GGN_PRODUCT: _product,
    Kind.HESSIAN_PRODUCT: _product,
}
"""Kind of quantity -> what it is at the outputs of the network."""
