"""BackPACK's rows for our modules: how each kind of quantity goes from a module's output to its input.

Notation as in `derivatives.base`: J Jacobian of the module, R residual, g gradient of the loss with respect to the output.
"""

from collections.abc import Callable
from typing import Any

import torch
from backpack.extensions import BatchDiagHessian
from backpack.extensions.backprop_extension import BackpropExtension
from backpack.extensions.module_extension import ModuleExtension
from torch import Tensor, nn

from secondorder.curvature.backpack.derivatives.base import Derivatives
from secondorder.curvature.backpack.derivatives.batch_norm import BatchNormDerivatives
from secondorder.curvature.backpack.hessian_factors import HessianFactors
from secondorder.curvature.backpack.kinds import Kind, kind_of

Product = Callable[[Tensor], Tensor]


class Row(ModuleExtension):
    """The row of a parameter-free module, for every extension."""

    def __init__(self, derivatives: Derivatives) -> None:
        super().__init__(params=[])
        self.derivatives = derivatives

    def backpropagate(
        self, extension: BackpropExtension, module: nn.Module, g_inp: tuple, g_out: tuple, quantity: Any
    ) -> Any:
        """The quantity at the input from that at the output."""
        kind = kind_of(extension)
        assert kind is not None  # only second-order extensions propagate
        return PROPAGATION[kind](self.derivatives, extension, module, g_out[0], quantity)


def _square_root(d: Derivatives, extension: BackpropExtension, module: nn.Module, g: Tensor, S: Tensor) -> Tensor:
    """J^T S."""
    return d.transposed(module, S, extension.get_subsampling())


def _average(d: Derivatives, extension: BackpropExtension, module: nn.Module, g: Tensor, B: Tensor) -> Tensor:
    """mean_n J_n^T B J_n."""
    return d.averaged(module, B)


def _hessian_factors(
    d: Derivatives, extension: BackpropExtension, module: nn.Module, g: Tensor, quantity: HessianFactors
) -> HessianFactors:
    """J^T F with F's sign for every factor, then those of R: exact, or random for an extension with a number of `draws`."""
    columns = [len(F) for F in quantity["matrices"]]
    matrices = list(d.transposed(module, torch.cat(quantity["matrices"])).split(columns))
    signs = list(quantity["signs"])
    if not d.hessian_is_zero(module):
        draws = getattr(extension, "draws", None)
        residual = d.signed_factors(module, g) if draws is None else d.signed_draws(module, g, draws)
        for F, sign in residual:
            matrices.append(F)
            signs.append(sign)
    return {"matrices": matrices, "signs": signs}


def _ggn_product(
    d: Derivatives, extension: BackpropExtension, module: nn.Module, g: Tensor, product: Product
) -> Product:
    """V -> J^T G J V."""
    return lambda V: d.transposed(module, product(d.jacobian(module, V)))


def _hessian_product(
    d: Derivatives, extension: BackpropExtension, module: nn.Module, g: Tensor, product: Product
) -> Product:
    """V -> J^T H J V + R V."""
    if d.hessian_is_zero(module):
        return _ggn_product(d, extension, module, g, product)
    return lambda V: d.transposed(module, product(d.jacobian(module, V))) + d.residual(module, g, V)


PROPAGATION: dict[Kind, Callable[..., Any]] = {
    Kind.SQUARE_ROOT: _square_root,
    Kind.AVERAGE: _average,
    Kind.HESSIAN_FACTORS: _hessian_factors,
    Kind.GGN_PRODUCT: _ggn_product,
    Kind.HESSIAN_PRODUCT: _hessian_product,
}
"""Kind of quantity -> its chain rule."""


class BatchNormRow(Row):
    """Batch normalisation in evaluation mode with the curvature of its weight and bias, for H as factors and for products."""

    derivatives: BatchNormDerivatives

    def __init__(self) -> None:
        ModuleExtension.__init__(self, params=["weight", "bias"])
        self.derivatives = BatchNormDerivatives()

    def weight(self, extension: BackpropExtension, module: nn.Module, g_inp: tuple, g_out: tuple, quantity: Any) -> Any:
        """The diagonal of the weight's block, or the product with it."""
        return self._parameter("weight", extension, module, quantity)

    def bias(self, extension: BackpropExtension, module: nn.Module, g_inp: tuple, g_out: tuple, quantity: Any) -> Any:
        """The diagonal of the bias's block, or the product with it."""
        return self._parameter("bias", extension, module, quantity)

    def _parameter(self, name: str, extension: BackpropExtension, module: nn.Module, quantity: Any) -> Any:
        """diag(J^T H J) `[C]` (or `[N, C]`, each sample), or V -> J^T H J V, with J the Jacobian in this parameter."""
        d = self.derivatives
        if kind_of(extension) is not Kind.HESSIAN_FACTORS:
            return lambda V: d.parameter_transposed(module, name, quantity(d.parameter_jacobian(module, name, V))).sum(
                1
            )
        diagonal = sum(
            sign * d.parameter_transposed(module, name, F).square().sum(0)
            for F, sign in zip(quantity["matrices"], quantity["signs"], strict=True)
        )
        return diagonal if isinstance(extension, BatchDiagHessian) else diagonal.sum(0)
