"""Derivatives of modules that are linear in their input."""

import torch
from torch import Tensor, nn
from torch.func import vjp

from secondorder.curvature.backpack.derivatives.base import Derivatives, inputs


class LinearMap(Derivatives):
    """y = J x for every x: average pooling, the upper triangle, slices and permutations of channels, the identity.

    J V is the module itself, applied to the columns of all samples as one batch.
    """

    def hessian_is_zero(self, module: nn.Module) -> bool:
        """True: a linear map has no second derivative."""
        return True

    def jacobian(self, module: nn.Module, V: Tensor) -> Tensor:
        """J V `[V, N, *out]`: the module itself applied to columns V `[V, N, *in]`."""
        return module.forward(V.flatten(0, 1)).unflatten(0, V.shape[:2])

    def transposed(self, module: nn.Module, G: Tensor, samples: list[int] | None = None) -> Tensor:
        """J^T G `[V, N, *in]`, the pull-back of columns G `[V, N, *out]`, which does not depend on the input."""
        anywhere = torch.zeros(G.shape[0] * G.shape[1], *inputs(module).shape[1:], dtype=G.dtype, device=G.device)
        return vjp(module.forward, anywhere)[1](G.flatten(0, 1))[0].unflatten(0, G.shape[:2])

    def residual(self, module: nn.Module, g: Tensor, V: Tensor) -> Tensor:
        """R V = 0 `[V, N, *in]`: a linear map has no residual."""
        return torch.zeros_like(V)
