"""Derivatives of activations."""

import torch
from torch import Tensor, nn
from torch.func import vjp

from secondorder.curvature.backpack.derivatives.base import Derivatives, inputs


class Elementwise(Derivatives):
    """y_i = f(x_i): J = diag(f'(x)) and R = diag(g f''(x)), both by reverse mode.

    `piecewise_linear` says that f'' = 0 wherever it exists.
    """

    def __init__(self, piecewise_linear: bool = False) -> None:
        self.piecewise_linear = piecewise_linear

    def hessian_is_zero(self, module: nn.Module) -> bool:
        """Whether the activation is piecewise linear, f'' = 0."""
        return self.piecewise_linear

    def jacobian(self, module: nn.Module, V: Tensor) -> Tensor:
        """J V = f'(x) * V, entry by entry: `[V, N, *in] -> [V, N, *in]`."""
        return _slope(module, inputs(module)) * V

    def transposed(self, module: nn.Module, G: Tensor, samples: list[int] | None = None) -> Tensor:
        """J^T G = f'(x) * G, entry by entry: `[V, N, *in] -> [V, N, *in]`; of `samples` only, when given."""
        return _slope(module, inputs(module, samples)) * G

    def residual(self, module: nn.Module, g: Tensor, V: Tensor) -> Tensor:
        """R V = g * f''(x) * V, entry by entry, for g `[N, *in]`: `[V, N, *in] -> [V, N, *in]`."""
        x = inputs(module)
        return vjp(lambda x: _slope(module, x), x)[1](g)[0] * V


def _slope(module: nn.Module, x: Tensor) -> Tensor:
    """f'(x) `[N, *in]`: the pull-back of ones."""
    pull_back = vjp(module.forward, x)[1]
    return pull_back(torch.ones_like(x))[0]
