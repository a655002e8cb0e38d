"""The inverse of the factors damped one by one, P W = (B + rho_B I)^-1 W (A + rho_A I)^-1, with rho_A rho_B = lambda.

    rho_A = pi sqrt(lambda)     rho_B = sqrt(lambda) / pi     pi^2 = (tr A / D) / (tr B / O)

J. Martens, R. Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, section 6.3.
pi is 1 where one of them is zero.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from secondorder.curvature.relative_damping import min_scale, safe_scale, tikhonov
from secondorder.kfac.inverses.diagonal import times, times_right
from secondorder.kfac.inverses.inverse import Factors, Inverse, Recipe
from secondorder.kfac.inverses.numerics import Problem


@dataclass(eq=False)
class Cholesky(Inverse):
    """(B + rho_B I)^-1 `[G, O, O]`, (A + rho_A I)^-1 `[G, D, D]`, and lambda = rho_A rho_B `[G, 1, 1]`.

    The damping is that of the time when they were made. Explicit inverses: two products a step, half the time of triangular
    solves, which pays for their making after about ten steps.
    """

    kind = "cholesky"
    shapes = MappingProxyType({"B_inverse": "GOO", "A_inverse": "GDD", "added": "G11"})
    B_inverse: Tensor
    A_inverse: Tensor
    added: Tensor

    def solve(self, gradient: Tensor, damping: float, relative: bool) -> Tensor:
        """P W = (B + rho_B I)^-1 W (A + rho_A I)^-1 `[G, O, D]` for the gradient W; the damping was fixed when P was made."""
        return times_right(times(self.B_inverse, gradient.to(self.B_inverse.dtype)), self.A_inverse).to(gradient.dtype)

    def tikhonov(self, damping: float, relative: bool) -> Tensor:
        """lambda = rho_A rho_B `[G, 1, 1]`, the damping of the time when P was made; the arguments are not used."""
        return self.added


def cholesky(layer: Factors, damping: float, relative: bool) -> Recipe:
    """The recipe of the inverses of two factors A and B, each damped by itself."""
    rho_A, rho_B = shifts_of(layer, damping, relative)

    def make(B: tuple[Tensor], A: tuple[Tensor]) -> Cholesky:
        return Cholesky(*B, *A, rho_A * rho_B)

    return Recipe([Problem(layer.B, rho_B), Problem(layer.given, rho_A)], make)


def shifts_of(layer: Factors, damping: float, relative: bool) -> tuple[Tensor, Tensor]:
    """rho_A = pi sqrt(lambda) and rho_B = sqrt(lambda) / pi, each `[G, 1, 1]`, of a layer's factors and damping."""
    mean_A, mean_B = layer.means()
    root = torch.as_tensor(tikhonov(safe_scale(layer.scale), damping, relative), dtype=mean_A.dtype).sqrt()
    least = min_scale(mean_A.dtype)
    both = (mean_A > least) & (mean_B > least)
    pi = torch.where(both, mean_A / mean_B, 1.0).sqrt()[:, None, None]
    return pi * root, root / pi
