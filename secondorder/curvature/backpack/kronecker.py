"""Kronecker factors of K-FAC and KFLR with the weight sharing of a convolution done right, as BackPACK extensions.

BackPACK sums the backpropagated vectors over positions before their outer product and leaves A undivided. A covariance head is
shift invariant: what reaches its input sums to zero over positions, and so the factor of a convolution below it is exactly
zero. The rows here use the factors of `curvature.kronecker.factors` instead:

    weight    [B, A], the block being B kron A (row-major); a factor pair for each of G groups: [G, O, O] and [G, D, D]
    bias      [B], the block that A = 1 leaves, as in the literature on weight sharing, not the exact one

An A of more than WIDE_INPUT rows is a `FactoredOperator` and never built.
"""

from typing import Any

from backpack.extensions import KFAC, KFLR, KFRA
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from backpack.extensions.secondorder.hbp.convnd import HBPConvNd
from backpack.extensions.secondorder.hbp.linear import HBPLinear
from torch import Tensor, nn

from secondorder.curvature.kronecker.factors import (
    SHARINGS,
    gradient_factor,
    input_factor,
    input_rows,
    input_width,
)
from secondorder.curvature.operators.factored import FactoredOperator
from secondorder.errors import unknown

WIDE_INPUT = 4096
"""Inputs above which A is kept as rows (`input_rows`), whose product is A, and never built: 64 MiB in float32."""


class WeightSharingKFAC(KFAC):
    """K-FAC with `mc_samples` vectors for each sample, `sharing` "expand" (KFC, Grosse and Martens 2016) or "reduce".

    Saved as `kfac_expand` or `kfac_reduce`. Raises InputError for another sharing.
    """

    def __init__(self, sharing: str = "expand", mc_samples: int = 1) -> None:
        super().__init__(mc_samples)
        _share(self, "kfac", sharing)


class WeightSharingKFLR(KFLR):
    """K-FAC with the exact root of the loss's Hessian (type 2), `sharing` "expand" or "reduce".

    Saved as `kflr_expand` or `kflr_reduce`. Raises InputError for another sharing.
    """

    def __init__(self, sharing: str = "expand") -> None:
        super().__init__()
        _share(self, "kflr", sharing)


class _Factors:
    """The factors of a layer as rows of BackPACK; goes before the row of the layer, which propagates."""

    def __init__(self, sharing: str, *dimensions: int) -> None:
        super().__init__(*dimensions)
        self.sharing = sharing

    def weight(self, extension: BackpropExtension, module: Any, g_inp: tuple, g_out: tuple, s: Tensor) -> list:
        """[B, A] from s `[V, N, *out]`."""
        x = module.input0.detach()
        B = gradient_factor(module, s, self.sharing)
        if input_width(module) > WIDE_INPUT and getattr(module, "groups", 1) == 1:
            return [B, FactoredOperator(input_rows(module, x, self.sharing))]
        return [B, input_factor(module, x, self.sharing)]

    def bias(self, extension: BackpropExtension, module: Any, g_inp: tuple, g_out: tuple, s: Tensor) -> list[Tensor]:
        """[B], the same as the weight's, which BackPACK has asked for just before unless the weight is frozen."""
        if module.weight.requires_grad:
            return [getattr(module.weight, extension.savefield)[0].clone()]
        return [gradient_factor(module, s, self.sharing)]


class LinearFactors(_Factors, HBPLinear):
    """The row of a linear layer for K-FAC and KFLR: its factors [B, A] of the weight and [B] of the bias."""


class ConvolutionFactors(_Factors, HBPConvNd):
    """The row of a convolution of 1, 2 or 3 `dimensions`, with any number of groups, for K-FAC and KFLR.

    [B, A] of the weight and [B] of the bias.
    """


class AveragedConvolutionFactors(HBPConvNd):
    """The row of a convolution for KFRA: the expand factors of an averaged matrix H `[O T, O T]` at the output.

    B_ij = sum_t H[(i, t), (j, t)],    A as for K-FAC; the bias keeps its exact sum over pairs of positions.
    """

    def weight(self, extension: BackpropExtension, module: Any, g_inp: tuple, g_out: tuple, H: Tensor) -> list[Tensor]:
        """[B, A], the expand factors of the weight: B `[O, O]` from H `[O T, O T]` (with groups `[G, O, O]`), and A."""
        channels, positions = module.out_channels, module.output.shape[2:].numel()
        B = H.reshape(channels, positions, channels, positions).diagonal(dim1=1, dim2=3).sum(-1)
        if module.groups > 1:
            size = channels // module.groups
            blocks = B.view(module.groups, size, module.groups, size)
            B = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return [B, input_factor(module, module.input0.detach(), "expand")]


def convolution_row(extension: BackpropExtension, dimensions: int) -> ModuleExtension | None:
    """The row of a convolution of so many dimensions for K-FAC, KFLR and KFRA; None for other extensions."""
    if isinstance(extension, KFRA):
        return AveragedConvolutionFactors(dimensions)
    return ConvolutionFactors(_sharing(extension), dimensions) if isinstance(extension, KFAC | KFLR) else None


def linear_row(extension: BackpropExtension) -> ModuleExtension | None:
    """The row of Linear for K-FAC and KFLR; None for other extensions."""
    return LinearFactors(_sharing(extension)) if isinstance(extension, KFAC | KFLR) else None


def _share(extension: BackpropExtension, name: str, sharing: str) -> None:
    """Set savefield and rows, so that the factors are right without `register`, too; transposed convolutions have none."""
    if sharing not in SHARINGS:
        raise unknown("weight sharing", sharing, SHARINGS)
    extension.sharing = sharing
    extension.savefield = f"{name}_{sharing}"
    for dimensions, convolution in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), start=1):
        extension.set_module_extension(convolution, ConvolutionFactors(sharing, dimensions), overwrite=True)
    extension.set_module_extension(nn.Linear, LinearFactors(sharing), overwrite=True)
    rows = extension._BackpropExtension__module_extensions  # BackPACK has no public way to take one out
    for transposed in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        del rows[transposed]


def _sharing(extension: BackpropExtension) -> str:
    """That of our own extensions, "expand" for BackPACK's."""
    return getattr(extension, "sharing", "expand")
