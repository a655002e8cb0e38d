"""The exact damped inverse of B kron A in the eigenbases of its factors, B = Q_B diag(beta) Q_B^T, A = Q_A diag(alpha) Q_A^T:

P W = Q_B [(Q_B^T W Q_A) / (beta alpha^T + lambda)] Q_A^T
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from torch import Tensor

from secondorder.curvature.relative_damping import safe_scale, tikhonov
from secondorder.kfac.inverses.diagonal import rotated, transposed
from secondorder.kfac.inverses.inverse import Factors, Inverse, Recipe, made
from secondorder.kfac.inverses.numerics import Eigen, Problem


class Rotated(Inverse):
    """An inverse that is diagonal in the bases Q_B and Q_A, with the scale `[G, 1, 1]` of its eigenvalues."""

    Q_B: Tensor
    Q_A: Tensor
    scale: Tensor

    @abstractmethod
    def damped_eigenvalues(self, added: Tensor | float) -> Tensor:
        """The eigenvalues plus lambda = `added`, `[G, O, D]`, a new tensor."""

    def solve(self, gradient: Tensor, damping: float, relative: bool, power: float = 1.0) -> Tensor:
        """P^p W = Q_B [(Q_B^T W Q_A) / (eigenvalues + lambda)^p] Q_A^T `[G, O, D]` for the gradient W, in its dtype."""
        damped = self.damped_eigenvalues(self.tikhonov(damping, relative))
        M = self.rotated(gradient).div_(damped if power == 1 else damped.pow_(power))
        return self.rotated_back(M).to(gradient.dtype)

    def rotated(self, W: Tensor) -> Tensor:
        """Q_B^T W Q_A `[G, O, D]`, W in the eigenbasis, a new tensor."""
        return rotated(transposed(self.Q_B), W.to(self.Q_B.dtype), self.Q_A)

    def rotated_back(self, M: Tensor) -> Tensor:
        """Q_B M Q_A^T `[G, O, D]`, the inverse of `rotated`."""
        return rotated(self.Q_B, M, transposed(self.Q_A))

    def tikhonov(self, damping: float, relative: bool) -> Tensor | float:
        """lambda: the damping times the eigenvalues' scale `[G, 1, 1]` where it is relative, otherwise the damping itself."""
        return tikhonov(self.scale, damping, relative)


@dataclass(eq=False)
class Eigenbasis(Rotated):
    """beta `[G, O]`, Q_B `[G, O, O]`, alpha `[G, D]`, Q_A `[G, D, D]`, and the scale `[G, 1, 1]` of the block."""

    kind = "eigen"
    shapes = MappingProxyType({"beta": "GO", "Q_B": "GOO", "alpha": "GD", "Q_A": "GDD", "scale": "G11"})
    beta: Tensor
    Q_B: Tensor
    alpha: Tensor
    Q_A: Tensor
    scale: Tensor

    def damped_eigenvalues(self, added: Tensor | float) -> Tensor:
        """beta alpha^T + lambda `[G, O, D]`, a new tensor, for lambda = `added`."""
        return self.eigenvalues().add_(added)

    def eigenvalues(self) -> Tensor:
        """beta alpha^T `[G, O, D]`, the products of the factors' eigenvalues."""
        return self.beta[:, :, None] * self.alpha[:, None, :]


def eigenbasis(layer: Factors) -> Recipe:
    """The recipe of an inverse in the eigenbases of a layer's two factors A and B."""
    return Recipe([Problem(layer.B), Problem(layer.given)], partial(joined, layer))


def joined(layer: Factors, B: Eigen, A: Eigen) -> Eigenbasis:
    """The inverse that the eigenvalues and -vectors of B and A make, with the scale of the layer's block."""
    return Eigenbasis(*B, *A, safe_scale(layer.scale))


def eigenbases(factors: Sequence[Factors], report: Counter[str]) -> list[Inverse | None]:
    """The inverses in the eigenbases of factors A and B, None for a layer of which one cannot be decomposed.

    What goes wrong is counted in `report`.
    """
    return made(map(eigenbasis, factors), report)
