"""Which quantities of BackPACK can be computed of a network: the table `QUANTITIES`, and the question for one model."""

from collections.abc import Callable

from backpack import extensions
from backpack.extensions.backprop_extension import BackpropExtension
from torch import nn

from secondorder.curvature.backpack.conversion import Twin, backpack_network
from secondorder.curvature.backpack.diag_hessian_mc import BatchDiagHessianMC, DiagHessianMC
from secondorder.curvature.backpack.kronecker import WeightSharingKFAC, WeightSharingKFLR
from secondorder.curvature.backpack.quantity import check_twin
from secondorder.curvature.backpack.refusals import check_extension
from secondorder.curvature.backpack.registration import register
from secondorder.errors import InputError, check_known

QUANTITIES: dict[str, Callable[..., BackpropExtension]] = {
    "BatchGrad": extensions.BatchGrad,
    "BatchL2Grad": extensions.BatchL2Grad,
    "SumGradSquared": extensions.SumGradSquared,
    "Variance": extensions.Variance,
    "DiagGGNExact": extensions.DiagGGNExact,
    "DiagGGNMC": extensions.DiagGGNMC,
    "BatchDiagGGNExact": extensions.BatchDiagGGNExact,
    "BatchDiagGGNMC": extensions.BatchDiagGGNMC,
    "SqrtGGNExact": extensions.SqrtGGNExact,
    "SqrtGGNMC": extensions.SqrtGGNMC,
    "DiagHessian": extensions.DiagHessian,
    "DiagHessianMC": DiagHessianMC,
    "BatchDiagHessian": extensions.BatchDiagHessian,
    "BatchDiagHessianMC": BatchDiagHessianMC,
    "KFAC": extensions.KFAC,
    "KFLR": extensions.KFLR,
    "WeightSharingKFAC": WeightSharingKFAC,
    "WeightSharingKFLR": WeightSharingKFLR,
    "WeightSharingKFAC, reduce": lambda **options: WeightSharingKFAC("reduce", **options),
    "WeightSharingKFLR, reduce": lambda **options: WeightSharingKFLR("reduce", **options),
    "KFRA": extensions.KFRA,
    "GGNMP": extensions.GGNMP,
    "HMP": extensions.HMP,
    "PCHMP": extensions.PCHMP,
}
"""Name -> how to make the extension."""


def supports(model: nn.Module, quantity: str) -> bool:
    """Whether `backpack_quantity` computes this quantity, a key of QUANTITIES, of the model in its present mode.

    Raises InputError for an unknown quantity.
    """
    known_quantity(quantity)
    try:
        twin = backpack_network(model)
    except InputError:
        return False
    return accepts(twin, quantity)


def accepts(twin: Twin, quantity: str) -> bool:
    """Whether the twin of a network has everything for the quantity."""
    try:
        check_twin(twin, registered(quantity))
    except InputError:
        return False
    return True


def registered(quantity: str) -> BackpropExtension:
    """The extension of this name with our rows. Raises InputError for those that are refused altogether."""
    return register(check_extension(known_quantity(quantity)()))


def check_support(model: nn.Module, quantity: str) -> None:
    """Raises InputError, naming module, quantity and the way out, unless the quantity can be computed of the model.

    Args:
        quantity: a key of QUANTITIES. The model counts in its present train or eval mode.
    """
    extension = registered(quantity)
    check_twin(backpack_network(model), extension)


def known_quantity(quantity: str) -> Callable[..., BackpropExtension]:
    """How to make the extension. InputError for a name that is not in QUANTITIES."""
    check_known("quantity", quantity, QUANTITIES)
    return QUANTITIES[quantity]
