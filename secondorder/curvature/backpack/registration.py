"""Second-order BackPACK extensions on networks with covariance pooling, and the tables of modules they then know."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.firstorder.batch_l2_grad import convnd, convtransposend
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn

from secondorder.curvature.backpack.branches import (
    ChannelShuffle,
    ChannelSlice,
    Concatenate,
    ConcatenateRow,
    Sum,
    SumRow,
)
from secondorder.curvature.backpack.criterion import Criterion, CriterionRow
from secondorder.curvature.backpack.derivatives.base import Derivatives
from secondorder.curvature.backpack.derivatives.batch_norm import BatchNormDerivatives
from secondorder.curvature.backpack.derivatives.covariance import CovarianceDerivatives
from secondorder.curvature.backpack.derivatives.elementwise import Elementwise
from secondorder.curvature.backpack.derivatives.linear_map import LinearMap
from secondorder.curvature.backpack.derivatives.matrix_function import MatrixFunctionDerivatives
from secondorder.curvature.backpack.derivatives.random_lift import RandomLiftDerivatives
from secondorder.curvature.backpack.grouped_norms import norms_row
from secondorder.curvature.backpack.hessian_factors import merged
from secondorder.curvature.backpack.kinds import Kind, kind_of
from secondorder.curvature.backpack.kronecker import convolution_row, linear_row
from secondorder.curvature.backpack.rows import BatchNormRow, Row
from secondorder.errors import InputError
from secondorder.pooling import Covariance, MatrixLogarithm, MatrixPower, MatrixSquareRoot, RandomLift, UpperTriangle

Extension = TypeVar("Extension", bound=BackpropExtension)

DERIVATIVES: dict[type[nn.Module], Derivatives] = {
    Covariance: CovarianceDerivatives(),
    MatrixSquareRoot: MatrixFunctionDerivatives(),
    MatrixPower: MatrixFunctionDerivatives(),
    MatrixLogarithm: MatrixFunctionDerivatives(),
    UpperTriangle: LinearMap(),
    RandomLift: RandomLiftDerivatives(),
    ChannelShuffle: LinearMap(),
    ChannelSlice: LinearMap(),
    nn.AdaptiveAvgPool2d: LinearMap(),
    nn.AvgPool2d: LinearMap(),
    nn.Identity: LinearMap(),
    nn.BatchNorm2d: BatchNormDerivatives(),
    nn.LeakyReLU: Elementwise(piecewise_linear=True),
    nn.ReLU6: Elementwise(piecewise_linear=True),
    nn.ELU: Elementwise(),
    nn.GELU: Elementwise(),
    nn.Hardswish: Elementwise(),
    nn.Sigmoid: Elementwise(),
    nn.SiLU: Elementwise(),
    nn.Softplus: Elementwise(),
    nn.Tanh: Elementwise(),
}
"""Parameter-free module -> its derivatives: the extension point for modules of one's own, see `register`."""

PARAMETER_KINDS = (Kind.HESSIAN_FACTORS, Kind.GGN_PRODUCT, Kind.HESSIAN_PRODUCT)
"""Kinds for which the parameters of batch normalisation have curvature; BackPACK has those with square roots, K-FAC none."""

ROWS: dict[type[nn.Module], Callable[[BackpropExtension], ModuleExtension | None]] = {
    nn.Conv1d: lambda extension: norms_row(extension, convnd.BatchL2Conv1d()) or convolution_row(extension, 1),
    nn.Conv2d: lambda extension: norms_row(extension, convnd.BatchL2Conv2d()) or convolution_row(extension, 2),
    nn.Conv3d: lambda extension: norms_row(extension, convnd.BatchL2Conv3d()) or convolution_row(extension, 3),
    nn.ConvTranspose1d: lambda extension: norms_row(extension, convtransposend.BatchL2ConvTranspose1d()),
    nn.ConvTranspose2d: lambda extension: norms_row(extension, convtransposend.BatchL2ConvTranspose2d()),
    nn.ConvTranspose3d: lambda extension: norms_row(extension, convtransposend.BatchL2ConvTranspose3d()),
    nn.Linear: linear_row,
    nn.BatchNorm2d: lambda extension: BatchNormRow() if kind_of(extension) in PARAMETER_KINDS else None,
    Sum: lambda extension: SumRow(),
    Concatenate: lambda extension: ConcatenateRow(),
}
"""Module with parameters or several inputs -> its row for an extension, or None where the general or BackPACK's row serves."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
REPLACED = (*CONVOLUTIONS, nn.Linear, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
"""Modules whose row in BackPACK we replace: wrong norms, wrong or too wide Kronecker factors, pooling in the default type."""


def register(extension: Extension) -> Extension:
    """The BackPACK extension itself, given rows for covariance pooling and for the modules of the networks of this package.

    For KFAC, KFLR, KFRA, (Batch)DiagGGN, SqrtGGN, (Batch)DiagHessian, GGNMP and HMP; of the first-order extensions only
    BatchL2Grad needs a row. Quantities that can be added where branches meet are; the others refuse. Registering twice
    changes nothing. A module of one's own without parameters needs one line in DERIVATIVES before `register`:

    >>> class AttentionPooling(nn.Module):
    ...     def forward(self, x):  # [N, C, H, W] -> [N, C]
    ...         x = x.flatten(2)
    ...         return (x * x.mean(1, keepdim=True).softmax(-1)).sum(-1)
    >>> DERIVATIVES[AttentionPooling] = Derivatives()
    >>> network = extend(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), AttentionPooling(), nn.Linear(4, 3)))
    >>> with backpack(register(DiagHessian())):
    ...     extend(nn.CrossEntropyLoss())(network(torch.rand(2, 1, 6, 6)), torch.tensor([0, 2])).backward()
    >>> network[0].weight.diag_h.shape
    torch.Size([4, 1, 3, 3])

    Raises InputError for PCHMP and for unknown second-order extensions.
    """
    kind = kind_of(extension)
    for module, build in ROWS.items():
        row = build(extension)
        if row is not None:
            _set(extension, module, row, replace=module in REPLACED)
    if kind is None:
        return extension
    _set(extension, Criterion, CriterionRow(), replace=False)
    for module, derivatives in DERIVATIVES.items():
        estimated = hasattr(extension, "draws") and not isinstance(derivatives, LinearMap | BatchNormDerivatives)
        _set(extension, module, Row(derivatives), replace=estimated or module in REPLACED)
    extension.accumulate_backpropagated_quantities = ACCUMULATION.get(kind, _refuse_branches)
    return extension


def _set(extension: BackpropExtension, module: type[nn.Module], row: ModuleExtension, replace: bool) -> None:
    """Add a row that the extension lacks, or `replace` the one it has."""
    with suppress(ValueError):  # it has one
        extension.set_module_extension(module, row, overwrite=replace)


def _added(existing: Tensor, other: Tensor) -> Tensor:
    """S_1 + S_2: square roots of the Gauss-Newton matrix are linear in the Jacobian."""
    return existing + other


def _refuse_branches(existing: Any, other: Any) -> Any:
    """InputError: the sum over branches lacks their cross terms J_1^T H J_2."""
    raise InputError(
        "averages and products are wrong where branches begin; use curvature_blocks(..., 'ggn' or 'hessian')"
    )


ACCUMULATION: dict[Kind, Callable[[Any, Any], Any]] = {Kind.SQUARE_ROOT: _added, Kind.HESSIAN_FACTORS: merged}
"""Kind -> the quantity of a module's output that feeds two branches; the other kinds are refused there."""
