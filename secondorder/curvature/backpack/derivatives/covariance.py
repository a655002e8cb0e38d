"""Derivatives of covariance pooling in closed form."""

import torch
from torch import Tensor, nn

from secondorder.curvature.backpack.derivatives.base import Derivatives, SignedFactors, inputs
from secondorder.pooling.covariance import positions


class CovarianceDerivatives(Derivatives):
    """S = X P X^T / M for features X `[C, M]` of a sample, with P = I - 1 1^T / M and Y = X P / M:

        J[V] = V Y^T + Y V^T,    J^T[G] = (G + G^T) Y,    R = (g + g^T) kron P / M.

    R does not vanish for a piecewise linear network: below a covariance, Hessian and Gauss-Newton matrix differ.
    """

    def jacobian(self, module: nn.Module, V: Tensor) -> Tensor:
        """V Y^T + Y V^T."""
        product = V.flatten(3) @ _scaled(positions(inputs(module))).mT
        return product + product.mT

    def transposed(self, module: nn.Module, G: Tensor, samples: list[int] | None = None) -> Tensor:
        """(G + G^T) Y."""
        x = inputs(module, samples)
        return ((G + G.mT) @ _scaled(positions(x))).view(len(G), *x.shape)

    def residual(self, module: nn.Module, g: Tensor, V: Tensor) -> Tensor:
        """(g + g^T) V P / M: centring commutes with the product from the left."""
        return ((g + g.mT) @ _scaled(V.flatten(3))).view(V.shape)

    def signed_factors(self, module: nn.Module, g: Tensor) -> SignedFactors:
        """From g + g^T = U diag(s) U^T: the columns sqrt(|s_k| / M) u_k kron P_m of each sign, as P is its own root.

        s is ascending, so that the k of one sign are an end of the spectrum: about C M columns for both signs together.
        """
        x = inputs(module)
        M = x[0, 0].numel()
        s, U = torch.linalg.eigh(g + g.mT)
        P = torch.eye(M, dtype=x.dtype, device=x.device) - 1 / M
        factors = []
        for sign in (1.0, -1.0):
            part = (sign * s).clamp_min(0)
            used = (part > 0).any(0)  # the directions that have this sign in some sample
            roots = (U * (part / M).sqrt()[:, None, :])[..., used]
            columns = torch.einsum("nck,mp->kmncp", roots, P)
            factors.append((columns.reshape(-1, *x.shape), sign))
        return factors


def _scaled(x: Tensor) -> Tensor:
    """Y = X P / M of features or columns of features `[..., C, M]`."""
    return (x - x.mean(-1, keepdim=True)) / x.shape[-1]
