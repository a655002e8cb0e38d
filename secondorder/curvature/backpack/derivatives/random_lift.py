"""Derivatives of the random lift in closed form."""

import torch
from torch import Tensor, nn

from secondorder.curvature.backpack.derivatives.base import Derivatives, SignedFactors, inputs
from secondorder.matrix_power.decomposition import symmetric_eigen
from secondorder.pooling import RandomLift


class RandomLiftDerivatives(Derivatives):
    """y = (z, s u_i u_j for i < j) with u = Q z. For the gradient g = (g', g'') of y, the parts of z and of the products,

        J[v]   = (v, s ((Q v)_i u_j + u_i (Q v)_j)),    J^T[g] = g' + s Q^T H(g'') u,    R = s Q^T H(g'') Q,

    with H(g'') `[C, C]` symmetric, g''_ij at the places ij and ji and zero on its diagonal: R = s sum_k g''_k (a_k b_k^T +
    b_k a_k^T) for the rows a_k = q_i and b_k = q_j of Q that make the product k.
    """

    def jacobian(self, module: nn.Module, V: Tensor) -> Tensor:
        """(V, s (dU_i u_j + u_i dU_j)) of columns V `[V, N, C]`, with dU = V Q^T."""
        z = inputs(module)
        Q, scale, pairs = _constants(module, z)
        product = (V @ Q.mT)[..., :, None] * (z @ Q.mT)[..., None, :]  # [V, N, C, C]
        return torch.cat([V, scale * (product + product.mT).flatten(-2).index_select(-1, pairs)], -1)

    def transposed(self, module: nn.Module, G: Tensor, samples: list[int] | None = None) -> Tensor:
        """J^T G = G' + s Q^T H(G'') u `[V, N, C]` of columns G `[V, N, C (C + 1) / 2]`: G' of z, G'' of the products."""
        z = inputs(module, samples)
        Q, scale, _ = _constants(module, z)
        Hu = (_symmetric(module, G) @ (z @ Q.mT)[..., None])[..., 0]
        return G[..., : z.shape[1]] + scale * Hu @ Q

    def residual(self, module: nn.Module, g: Tensor, V: Tensor) -> Tensor:
        """R V = s Q^T H(g'') Q V `[V, N, C]`, g'' the part of the gradient that belongs to the products u_i u_j."""
        Q, scale, _ = _constants(module, V)
        HV = (_symmetric(module, g) @ (V @ Q.mT)[..., None])[..., 0]
        return scale * HV @ Q

    def signed_factors(self, module: nn.Module, g: Tensor) -> SignedFactors:
        """From H(g'') = U diag(h) U^T: the columns sqrt(s |h_k|) Q^T u_k of each sign, C columns for both together.

        h is ascending, so that the k of one sign are an end of the spectrum.
        """
        Q, scale, _ = _constants(module, g)
        h, U = symmetric_eigen(_symmetric(module, g))
        factors = []
        for sign in (1.0, -1.0):
            weight = (scale * sign * h).clamp_min(0)
            used = (weight > 0).any(0)  # the directions that have this sign in some sample
            columns = (U * weight.sqrt()[:, None, :])[..., used]  # [N, C, k]
            if columns.shape[-1]:  # a factor without columns comes out of BackPACK's convolutions as NaN
                factors.append((columns.movedim(-1, 0) @ Q, sign))
        return factors


def _constants(module: nn.Module, like: Tensor) -> tuple[Tensor, float, Tensor]:
    """Q `[C, C]` in the type of another tensor, s, and the places i C + j of the products in a flattened matrix."""
    lift: RandomLift = module  # type: ignore[assignment]
    return lift.rotation.to(like.dtype), lift.scale, lift.pairs


def _symmetric(module: nn.Module, g: Tensor) -> Tensor:
    """H(g'') `[..., C, C]` of gradients g `[..., C (C + 1) / 2]`."""
    Q, _, pairs = _constants(module, g)
    C = len(Q)
    upper = g.new_zeros(*g.shape[:-1], C * C).index_copy(-1, pairs, g[..., C:]).unflatten(-1, (C, C))
    return upper + upper.mT
