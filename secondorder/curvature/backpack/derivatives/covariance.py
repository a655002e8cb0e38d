"""Derivatives of covariance pooling in closed form."""

import torch
from torch import Tensor, nn

from secondorder.curvature.backpack.derivatives.base import Derivatives, SignedFactors, inputs
from secondorder.matrix_power.decomposition import symmetric_eigen
from secondorder.pooling.covariance import positions
from secondorder.pooling.layout import LAYOUTS


class CovarianceDerivatives(Derivatives):
    """S = X P X^T / M for features X `[C, M]` of a sample, with P = I - 1 1^T / M and Y = X P / M:

        J[V] = V Y^T + Y V^T,    J^T[G] = (G + G^T) Y,    R = (g + g^T) kron P / M.

    R does not vanish for a piecewise linear network: below a covariance, Hessian and Gauss-Newton matrix differ.
    """

    def jacobian(self, module: nn.Module, V: Tensor) -> Tensor:
        """J V = V Y^T + Y V^T `[V, N, C, C]` of columns V `[V, N, *in]`, Y the centred features divided by M."""
        product = _columns(module, V) @ _scaled(positions(inputs(module), _layout(module))).mT
        return product + product.mT

    def transposed(self, module: nn.Module, G: Tensor, samples: list[int] | None = None) -> Tensor:
        """J^T G = (G + G^T) Y `[V, N, *in]` of matrices G `[V, N, C, C]`, Y the centred features divided by M."""
        x = inputs(module, samples)
        return _as_inputs(module, (G + G.mT) @ _scaled(positions(x, _layout(module))), x)

    def residual(self, module: nn.Module, g: Tensor, V: Tensor) -> Tensor:
        """R V = (g + g^T) V P / M `[V, N, *in]` for g = dL/dS `[N, C, C]`: centring P commutes with the product from the left."""
        return _as_inputs(module, (g + g.mT) @ _scaled(_columns(module, V)), V[0])

    def signed_factors(self, module: nn.Module, g: Tensor) -> SignedFactors:
        """From g + g^T = U diag(s) U^T: the columns sqrt(|s_k| / M) u_k kron P_m of each sign, as P is its own root.

        s is ascending, so that the k of one sign are an end of the spectrum: about C M columns for both signs together.
        """
        x = inputs(module)
        M = positions(x, _layout(module)).shape[-1]
        s, U = symmetric_eigen(g + g.mT)
        P = torch.eye(M, dtype=x.dtype, device=x.device) - 1 / M
        factors = []
        for sign in (1.0, -1.0):
            part = (sign * s).clamp_min(0)
            used = (part > 0).any(0)  # the directions that have this sign in some sample
            roots = (U * (part / M).sqrt()[:, None, :])[..., used]
            columns = torch.einsum("nck,mp->kmncp", roots, P)
            if len(columns):  # a factor without columns comes out of BackPACK's convolutions as NaN
                factors.append((_as_inputs(module, columns.flatten(0, 1), x), sign))
        return factors


def _scaled(x: Tensor) -> Tensor:
    """Y = X P / M of features or columns of features `[..., C, M]`."""
    return (x - x.mean(-1, keepdim=True)) / x.shape[-1]


def _layout(module: nn.Module) -> str:
    return str(module.layout)


def _columns(module: nn.Module, V: Tensor) -> Tensor:
    """Columns `[V, N, *in]` in the module's layout as `[V, N, C, M]`."""
    return V.flatten(2, -2).mT if LAYOUTS[_layout(module)].channels_last else V.flatten(3)


def _as_inputs(module: nn.Module, Y: Tensor, x: Tensor) -> Tensor:
    """Columns `[V, N, C, M]` in the shape of the inputs x `[N, *in]`: `[V, N, *in]`."""
    return (Y.mT if LAYOUTS[_layout(module)].channels_last else Y).reshape(len(Y), *x.shape)
