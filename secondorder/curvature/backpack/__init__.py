"""BackPACK on networks with covariance pooling: rows for our modules, right Kronecker factors, branches, and refusals."""

from secondorder.curvature.backpack.conversion import backpack_network
from secondorder.curvature.backpack.diag_hessian_mc import BatchDiagHessianMC, DiagHessianMC
from secondorder.curvature.backpack.kronecker import WeightSharingKFAC, WeightSharingKFLR
from secondorder.curvature.backpack.quantity import backpack_quantity
from secondorder.curvature.backpack.registration import register
from secondorder.curvature.backpack.support import check_support, supports

__all__ = [
    "BatchDiagHessianMC",
    "DiagHessianMC",
    "WeightSharingKFAC",
    "WeightSharingKFLR",
    "backpack_network",
    "backpack_quantity",
    "check_support",
    "register",
    "supports",
]
