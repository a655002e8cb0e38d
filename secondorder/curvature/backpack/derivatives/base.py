"""Derivatives of any parameter-free module by automatic differentiation; closed forms override them.

A module maps a sample's input x to y = f(x), J = dy/dx; g = dL/dy is the gradient of the loss. Index letters: V columns,
N samples, `*in` and `*out` the shapes of one sample's input and output.

    chain rule of curvature    H_x = J^T H_y J + R,    R = sum_k g_k d^2 y_k / dx^2 (the residual, symmetric, any sign)

R enters a diagonal as signed factors R = sum_+ F F^T - sum_- F F^T. With columns z, sum z z^T = I, and any c > 0

    F_+- = (R z +- c z) / (2 sqrt c):    F_+ F_+^T - F_- F_-^T = (R z z^T + z z^T R) / 2,    which sums to R

(polarisation): no eigenvalues of R are needed, and random z with E[z z^T] = I give an unbiased estimate of R.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

SignedFactors = list[tuple[Tensor, float]]
"""Factors F `[V, N, *in]`, each with its sign +1 or -1."""


class Derivatives:
    """Derivatives of a parameter-free module that treats samples independently, by `torch.func` of its `forward`.

    Serves any pooling or other module written in differentiable operations. The input is the one that BackPACK stored as
    `module.input0`; `forward` is called without hooks.
    """

    def function(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """f, as what it is differentiated: the module's `forward`."""
        return module.forward

    def hessian_is_zero(self, module: nn.Module) -> bool:
        """Whether R = 0 for every g: the module is linear or piecewise linear."""
        return False

    def jacobian(self, module: nn.Module, V: Tensor) -> Tensor:
        """J V: `[V, N, *in] -> [V, N, *out]`."""
        x = inputs(module)
        return vmap(lambda v: jvp(self.function(module), (x,), (v,))[1])(V)

    def transposed(self, module: nn.Module, G: Tensor, samples: list[int] | None = None) -> Tensor:
        """J^T G: `[V, N, *out] -> [V, N, *in]`; of `samples` only, when given, which are then the N samples of G."""
        pull_back = vjp(self.function(module), inputs(module, samples))[1]
        return vmap(lambda g: pull_back(g)[0])(G)

    def averaged(self, module: nn.Module, B: Tensor) -> Tensor:
        """mean_n J_n^T B J_n for symmetric B: `[D_out, D_out] -> [D_in, D_in]`, features in row-major order."""
        x = inputs(module)
        stored: Any = module
        outputs = stored.output.shape[1:]
        total = B.new_zeros(x[0].numel(), x[0].numel())
        for n in range(len(x)):
            BJ = self.transposed(module, B.reshape(-1, 1, *outputs), [n]).flatten(1)
            total += self.transposed(module, BJ.mT.reshape(-1, 1, *outputs), [n]).flatten(1)
        return total / len(x)

    def residual(self, module: nn.Module, g: Tensor, V: Tensor) -> Tensor:
        """R V with g `[N, *out]`: `[V, N, *in] -> [V, N, *in]`, forward over reverse."""
        x = inputs(module)

        def gradient(x: Tensor) -> Tensor:
            return vjp(self.function(module), x)[1](g)[0]

        return vmap(lambda v: jvp(gradient, (x,), (v,))[1])(V)

    def signed_factors(self, module: nn.Module, g: Tensor) -> SignedFactors:
        """R exactly, in as many columns for each sign as `basis` has."""
        x = inputs(module)
        z = self.basis(x)[:, None].expand(-1, len(x), *x.shape[1:])
        return polarised(z, self.residual(module, g, z))

    def signed_draws(self, module: nn.Module, g: Tensor, draws: int) -> SignedFactors:
        """An unbiased estimate of R in `draws` columns for each sign, drawn from torch's random state."""
        z = self.draw(inputs(module), draws) / draws**0.5
        return polarised(z, self.residual(module, g, z))

    def basis(self, x: Tensor) -> Tensor:
        """An orthonormal basis `[V, *in]` of the space on which R acts, here of all inputs."""
        return torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, *x.shape[1:])

    def draw(self, x: Tensor, draws: int) -> Tensor:
        """Random columns `[draws, N, *in]` with E[z z^T] = I on the space on which R acts, here independent signs."""
        return random_signs(draws, x)


def inputs(module: nn.Module, samples: list[int] | None = None) -> Tensor:
    """The input `[N, *in]` of the last forward pass, or that of some samples, as a constant."""
    stored: Any = module
    x = stored.input0.detach()
    return x if samples is None else x[samples]


def random_signs(draws: int, x: Tensor) -> Tensor:
    """+1 or -1 with probability 1/2 each, `draws` columns of the shape of x."""
    return torch.randint(2, (draws, *x.shape), device=x.device).to(x.dtype).mul_(2).sub_(1)


def polarised(z: Tensor, Rz: Tensor) -> SignedFactors:
    """F_+ and F_- for columns z and R z `[V, N, *in]`; c = |R z| / |z| for each column makes both terms equally large."""
    ratio = Rz.flatten(2).norm(dim=-1) / z.flatten(2).norm(dim=-1)
    root = ratio.clamp_min(torch.finfo(z.dtype).tiny).sqrt().view(*z.shape[:2], *[1] * (z.ndim - 2))
    return [((Rz / root + sign * root * z) / 2, sign) for sign in (1.0, -1.0)]
