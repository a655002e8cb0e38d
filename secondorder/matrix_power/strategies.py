"""From features or a matrix to Z = f(S) and back: what surrounds a kernel, and the plain definition of the same function.

S = Xc Xc^T / M for features X `[..., C, M]` with M positions. In units c of the largest entry (`units`), with norm = ||Xc|| / c,
t = norm^2 / M, Xn = Xc / (c norm) and A = Xn Xn^T of trace 1 every number that a kernel sees is at most 1, whatever the scale of
the features; zero features give Z = 0 with gradient 0. With f(S) = v f'(S / c^2) and w = v / c (`spectrum.InUnits`)

    dL/dX = w 2 D Xn / norm,    D = t dL/dS for f'    (the rows of Xn are centred, so those of D Xn are)

A strategy has a fast `forward` and a fast `gradient`; higher derivatives are those of its `pull_back`, the gradient by the plain
definition of f', so that no power of c leaves the range of numbers before the last factor.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from secondorder.matrix_power.covariance import centred, centred_in_units, covariance_matrix
from secondorder.matrix_power.kernels import Eigen, Kernel, Saved
from secondorder.matrix_power.transforms import symmetric
from secondorder.matrix_power.units import unit
from secondorder.matrix_power.upper_triangle import twice_symmetric, upper_triangle


@dataclass(frozen=True)
class OnMatrix:
    """S `[..., C, C]` -> f(S), through eigenvalues: S may have negative ones, which count as zero."""

    kernel: Eigen

    def reference(self, S: Tensor) -> Tensor:
        """f of the symmetric part of S `[..., C, C]` by the plain definition, so that the derivatives of all modes agree."""
        return self.kernel.function.of_matrix(symmetric(S))

    def pull_back(self, S: Tensor, G: Tensor) -> Tensor:
        """dL/dS `[..., C, C]` from G = dL/dZ by differentiating the plain definition; it can be differentiated again."""
        c = unit(S.detach())
        scaled = self.kernel.function.in_units(c, 1)
        return _gradient(lambda S: scaled.function.of_unit_matrix(symmetric(S)), S / c, G, scaled.gradient)

    def forward(self, S: Tensor) -> tuple[Tensor, Saved]:
        """Z = f(S) `[..., C, C]`, and what `gradient` needs: first one factor or half of it."""
        c = unit(S)
        scaled = self.kernel.function.in_units(c, 1)
        Z, saved = replace(self.kernel, function=scaled.function).root(symmetric(S / c), torch.ones_like(c))
        factor = scaled.gradient[0] if len(scaled.gradient) == 2 else scaled.gradient[0].sqrt()
        return _multiply(Z, scaled.value), (factor, *saved)

    def gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """dL/dS `[..., C, C]`, symmetric, from G = dL/dZ and what `forward` has saved."""
        factor, *rest = saved
        return self.kernel.root_gradient(symmetric(G) * factor, tuple(rest)).mul_(factor)


@dataclass(frozen=True)
class OnFeatures:
    """X `[..., C, M]` -> f(S) `[..., C, C]`, or its upper triangle; `gram` for the space of positions."""

    kernel: Kernel
    gram: bool
    triangle: bool

    def reference(self, x: Tensor) -> Tensor:
        """f of the covariance of x `[..., C, M]` by the plain definition, `[..., C, C]` or its upper triangle."""
        Z = self.kernel.function.of_covariance(x)
        return upper_triangle(Z) if self.triangle else Z

    def pull_back(self, x: Tensor, G: Tensor) -> Tensor:
        """dL/dX `[..., C, M]` from G = dL/dZ by differentiating the plain definition; it can be differentiated again."""
        c = unit(x.detach())
        scaled = self.kernel.function.in_units(c, 2)

        def plain(x: Tensor) -> Tensor:
            Z = scaled.function.of_unit_covariance(x)
            return upper_triangle(Z) if self.triangle else Z

        return _gradient(plain, x / c, G, scaled.gradient)

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:
        """Z = f(S) `[..., C, C]`, or its upper triangle, by the kernel, and what `gradient` needs."""
        c = unit(x)
        scaled = self.kernel.function.in_units(c, 2)
        kernel = replace(self.kernel, function=scaled.function)  # type: ignore[type-var]
        Xn = centred_in_units(x, c)
        norm = torch.linalg.vector_norm(Xn, dim=(-2, -1), keepdim=True)
        inverse = torch.where(norm == 0, 0, 1 / norm)
        Xn, t = Xn.mul_(inverse), norm.square() / x.shape[-1]
        if self.gram:
            Z, saved = kernel.gram(Xn, t)
        else:
            Z, saved = kernel.root(Xn @ Xn.mT, t)
            saved = (Xn, *saved)
        Z = upper_triangle(Z) if self.triangle else Z
        first, *second = scaled.gradient
        return _multiply(Z, scaled.value, self.triangle), (first * inverse, *(second or (torch.ones_like(c),)), *saved)

    def gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """dL/dX `[..., C, M]` by the kernel, from G = dL/dZ (of the upper triangle its gradient) and what `forward` has saved."""
        first, second, *rest = saved
        G = twice_symmetric(G) if self.triangle else G + G.mT
        if self.gram:
            gradient = self.kernel.gram_gradient(G, tuple(rest)).mul_(first)
        else:
            Xn, *rest = rest
            gradient = (self.kernel.root_gradient(G, tuple(rest)) @ Xn).mul_(first)
        return gradient if self.kernel.function.degree == 0.5 else gradient.mul_(second)


@dataclass(frozen=True)
class Covariance:
    """X `[..., C, M]` -> S = Xc Xc^T / M `[..., C, C]`, infinite or zero where that is beyond the range of numbers."""

    def reference(self, x: Tensor) -> Tensor:
        """S = Xc Xc^T / M `[..., C, C]` of x `[..., C, M]` by the plain definition."""
        return covariance_matrix(x)

    def pull_back(self, x: Tensor, G: Tensor) -> Tensor:
        """dL/dX = (G + G^T) Xc / M `[..., C, M]` from G = dL/dS `[..., C, C]`; it can be differentiated again."""
        return (G + G.mT) @ (centred(x) / x.shape[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, Saved]:
        """S = Xc Xc^T / M `[..., C, C]`, and what `gradient` needs: Xc / (c M) and the unit c."""
        c = unit(x)
        x = centred_in_units(x, c)
        scaled = x / x.shape[-1]
        return (x @ scaled.mT).mul_(c).mul_(c), (scaled, c)

    def gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """dL/dX = (G + G^T) Xc / M `[..., C, M]` from G = dL/dS `[..., C, C]` and what `forward` has saved."""
        scaled, c = saved
        return ((G + G.mT) @ scaled).mul_(c)


@dataclass(frozen=True)
class Square:
    """S `[..., C, C]` -> S S, infinite or zero where that is beyond the range of numbers."""

    def reference(self, S: Tensor) -> Tensor:
        """S S `[..., C, C]` by the plain definition."""
        return S @ S

    def pull_back(self, S: Tensor, G: Tensor) -> Tensor:
        """dL/dS = G S^T + S^T G `[..., C, C]` from G = dL/d(S S); it can be differentiated again."""
        return G @ S.mT + S.mT @ G

    def forward(self, S: Tensor) -> tuple[Tensor, Saved]:
        """S S `[..., C, C]`, and what `gradient` needs: S / c and the unit c."""
        c = unit(S)
        S = S / c
        return (S @ S).mul_(c).mul_(c), (S, c)

    def gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """dL/dS = G S^T + S^T G `[..., C, C]` from G = dL/d(S S) and what `forward` has saved."""
        S, c = saved
        return self.pull_back(S, G).mul_(c)


def _multiply(Z: Tensor, factors: tuple[Tensor, ...], triangle: bool = False) -> Tensor:
    """Z times factors `[..., 1, 1]`, in place."""
    for factor in factors:
        Z.mul_(factor[..., 0] if triangle else factor)
    return Z


def _gradient(function: Callable[[Tensor], Tensor], x: Tensor, G: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """The transposed derivative of a function at x, applied to G, times factors."""
    return reduce(torch.mul, factors, torch.func.vjp(function, x)[1](G)[0])
