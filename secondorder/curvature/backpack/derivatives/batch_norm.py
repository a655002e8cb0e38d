"""Derivatives of batch normalisation in evaluation mode."""

from typing import Any

import torch
from torch import Tensor, nn

from secondorder.curvature.backpack.derivatives.base import Derivatives, inputs
from secondorder.errors import InputError


class BatchNormDerivatives(Derivatives):
    """y = w (x - m) / sqrt(v + eps) + b with the running mean m and variance v as constants: J = diag(w / sqrt(v + eps)).

    Linear in x, and linear in (w, b): no residual, and the curvature of w and b is that of the output.
    """

    def hessian_is_zero(self, module: nn.Module) -> bool:
        """True: in evaluation mode, the only one supported, batch normalisation is linear."""
        return True

    def jacobian(self, module: Any, V: Tensor) -> Tensor:
        """J V `[V, N, C, H, W]`: each channel of V scaled by w / sqrt(v + eps). Raises InputError in training mode."""
        scale = _inverse_deviation(module)
        return (scale if module.weight is None else scale * module.weight.detach()[:, None, None]) * V

    def transposed(self, module: Any, G: Tensor, samples: list[int] | None = None) -> Tensor:
        """J^T G `[V, N, C, H, W]`, which is J G since J is diagonal. Raises InputError in training mode."""
        return self.jacobian(module, G)

    def parameter_jacobian(self, module: Any, name: str, V: Tensor) -> Tensor:
        """dy/dw V or dy/db V: `[V, C] -> [V, N, C, H, W]`."""
        return V[:, None, :, None, None] * _slope(module, name)

    def parameter_transposed(self, module: Any, name: str, G: Tensor) -> Tensor:
        """(dy/dw)^T G or (dy/db)^T G for each sample: `[V, N, C, H, W] -> [V, N, C]`."""
        return (G * _slope(module, name)).sum((-2, -1))


def _inverse_deviation(module: Any) -> Tensor:
    """1 / sqrt(v + eps) `[C, 1, 1]`. Raises InputError in training mode, where samples depend on each other."""
    if module.training or module.running_var is None:
        raise InputError("curvature of batch normalisation needs evaluation mode and running statistics; call .eval()")
    return (module.running_var + module.eps).rsqrt()[:, None, None]


def _slope(module: Any, name: str) -> Tensor:
    """dy/dw = (x - m) / sqrt(v + eps) or dy/db = 1 at every position `[N, C, H, W]`."""
    x = inputs(module)
    if name == "bias":
        return torch.ones_like(x)
    return (x - module.running_mean[:, None, None]) * _inverse_deviation(module)
