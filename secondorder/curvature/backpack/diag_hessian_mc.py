"""Monte-Carlo diagonal of the Hessian: exact but for the residuals, which are estimated from random columns.

An exact residual of covariance and matrix root takes C M + C (C + 1) columns through the whole network (for 64 channels and
64 positions 8,256), a draw takes two for each nonlinear module: R = E[z (R z)^T], see `derivatives.base`.
"""

from backpack.extensions import BatchDiagHessian, DiagHessian
from backpack.extensions.backprop_extension import BackpropExtension

from secondorder.errors import check_whole


class DiagHessianMC(DiagHessian):
    """An unbiased estimate of the Hessian's diagonal from `draws` random columns for each nonlinear module.

    Saved as `diag_h_mc`, of the parameter's shape. The Gauss-Newton part is exact. Needs `register`; the columns are drawn
    from torch's random state. Raises InputError for a number of draws below 1.
    """

    def __init__(self, draws: int = 1) -> None:
        super().__init__()
        _draw(self, "diag_h_mc", draws)


class BatchDiagHessianMC(BatchDiagHessian):
    """An unbiased estimate of the diagonal of each sample's Hessian from `draws` random columns for each nonlinear module.

    Saved as `diag_h_batch_mc`, `[N, ...]` with the parameter's shape. The Gauss-Newton part is exact. Needs `register`; the
    columns are drawn from torch's random state. Raises InputError for a number of draws below 1.
    """

    def __init__(self, draws: int = 1) -> None:
        super().__init__()
        _draw(self, "diag_h_batch_mc", draws)


def _draw(extension: BackpropExtension, savefield: str, draws: int) -> None:
    check_whole("draws", draws)
    extension.draws = draws
    extension.savefield = savefield
