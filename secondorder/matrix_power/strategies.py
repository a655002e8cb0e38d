"""From features or a matrix to Z = f(S) and back: what surrounds a kernel, and the plain definition of the same function.

S = Xc Xc^T / M for features X `[..., C, M]` with M positions. With t = tr(S), Xn = Xc / ||Xc|| and A = S / t = Xn Xn^T every
number that a kernel sees is at most 1, whatever the scale of the features; zero features give Z = 0 with gradient 0.

    dL/dX = 2 D Xn / ||Xc||,    D = t dL/dS    (the rows of Xn are centred, so those of D Xn are)

A strategy has a fast `forward` and a fast `gradient`; second derivatives are those of its `reference` (`two_level`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder.matrix_power.kernels import Kernel, Saved
from secondorder.matrix_power.transforms import symmetric
from secondorder.matrix_power.upper_triangle import twice_symmetric, upper_triangle


@dataclass(frozen=True)
class OnMatrix:
    """S `[..., C, C]` -> f(S)."""

    kernel: Kernel

    def reference(self, S: Tensor) -> Tensor:
        """The plain definition, of the symmetric part like `gradient`: then the derivatives of all modes agree."""
        return self.kernel.function.of_matrix(symmetric(S))

    def forward(self, S: Tensor) -> tuple[Tensor, Saved]:
        """Value, and what `gradient` needs."""
        t = S.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        inverse = torch.where(t > 0, 1 / t, 0)
        Z, saved = self.kernel.root(S * inverse, t)
        return Z, (inverse, *saved)

    def gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """dL/dS, symmetric."""
        inverse, *rest = saved
        return self.kernel.root_gradient(G + G.mT, tuple(rest)).mul_(inverse / 2)


@dataclass(frozen=True)
class OnFeatures:
    """X `[..., C, M]` -> f(S) `[..., C, C]`, or its upper triangle; `gram` for the space of positions."""

    kernel: Kernel
    gram: bool
    triangle: bool

    def reference(self, x: Tensor) -> Tensor:
        """The plain definition."""
        Z = self.kernel.function.of_covariance(x)
        return upper_triangle(Z) if self.triangle else Z

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:
        """Value, and what `gradient` needs."""
        Xn = x - x.mean(-1, keepdim=True)
        norm = torch.linalg.vector_norm(Xn, dim=(-2, -1), keepdim=True)
        inverse = torch.where(norm > 0, 1 / norm, 0)
        Xn, t = Xn.mul_(inverse), norm.square() / x.shape[-1]
        if self.gram:
            Z, saved = self.kernel.gram(Xn, t)
        else:
            Z, saved = self.kernel.root(Xn @ Xn.mT, t)
            saved = (Xn, *saved)
        return upper_triangle(Z) if self.triangle else Z, (inverse, *saved)

    def gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """dL/dX."""
        inverse, *rest = saved
        G = twice_symmetric(G) if self.triangle else G + G.mT
        if self.gram:
            return self.kernel.gram_gradient(G, tuple(rest)).mul_(inverse)
        Xn, *rest = rest
        return (self.kernel.root_gradient(G, tuple(rest)) @ Xn).mul_(inverse)
