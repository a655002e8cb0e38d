"""The two ways of computing f on matrices of trace 1: eigenvalues, and matrix products (Newton-Schulz only).

Each kernel works in two spaces. For A = S / t `[..., C, C]`: `root` gives Z = f(S), `root_gradient` gives D = t dL/dS. For
normalised features Xn `[..., C, M]`, A = Xn Xn^T: f(0) = 0, so with h(a) = f(t a) / a

    Z = Xn h(K) Xn^T,    K = Xn^T Xn `[..., M, M]`, the Gram matrix of the positions,

smaller than A when there are fewer positions than channels: `gram` gives Z, `gram_gradient` gives D Xn. Gradients G of Z
are symmetric, traces t are `[..., 1, 1]`. In eigencoordinates of A, with the spectrum g_i, g_ij, b_i (`spectrum`),

    D = U (g_ij G~_ij) U^T + s I,    G~ = U^T G U,    s = sum_i b_i G~_ii.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from secondorder.matrix_power.newton_schulz import iterate, pull_back
from secondorder.matrix_power.spectral import eigenvalues
from secondorder.matrix_power.spectrum import MatrixFunction, NewtonSchulz

Saved = tuple[Tensor, ...]


class Kernel(Protocol):
    """Value and first derivative of f in the space of channels and in the space of positions."""

    @property
    def function(self) -> MatrixFunction:
        """f, the function of a matrix that this kernel computes."""

    def root(self, A: Tensor, t: Tensor) -> tuple[Tensor, Saved]:
        """Z = f(S) `[..., C, C]` from A = S / t and the trace t `[..., 1, 1]`, and what `root_gradient` needs."""

    def root_gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """D = t dL/dS `[..., C, C]` from the symmetric G = dL/dZ `[..., C, C]` and what `root` has saved."""

    def gram(self, Xn: Tensor, t: Tensor) -> tuple[Tensor, Saved]:
        """Z = f(S) `[..., C, C]` from normalised features Xn `[..., C, M]` and the trace t, and what `gram_gradient` needs."""

    def gram_gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """D Xn `[..., C, M]`, D = t dL/dS, from the symmetric G = dL/dZ `[..., C, C]` and what `gram` has saved."""


@dataclass(frozen=True)
class Eigen:
    """The kernel through eigenvalues: one eigen-decomposition, no iteration, for any `function`."""

    function: MatrixFunction

    def root(self, A: Tensor, t: Tensor) -> tuple[Tensor, Saved]:
        """Z = U diag(g) U^T `[..., C, C]` by the eigenvectors U of A, and U, g_ij and b_i for `root_gradient`."""
        a, U = eigenvalues(A)
        spectrum = self.function.spectrum(a, t[..., 0], a.shape[-1])
        return (U * spectrum.value[..., None, :]) @ U.mT, (U, spectrum.first, spectrum.trace)

    def root_gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """D = U (g_ij G~_ij + s I) U^T `[..., C, C]` with G~ = U^T G U and s = sum_i b_i G~_ii."""
        U, first, b = saved
        inner = U.mT @ (G @ U)
        diagonal = inner.diagonal(dim1=-2, dim2=-1)
        s = (b * diagonal).sum(-1, keepdim=True)
        inner = inner.mul_(first)
        inner.diagonal(dim1=-2, dim2=-1).add_(s)
        return U @ inner @ U.mT

    def gram(self, Xn: Tensor, t: Tensor) -> tuple[Tensor, Saved]:
        """Z = P diag(h) P^T `[..., C, C]` with K = Xn^T Xn = W diag(a) W^T and P = Xn W, and what `gram_gradient` needs."""
        a, W = eigenvalues(Xn.mT @ Xn)
        value, first, b, a = self.function.spectrum(a, t[..., 0], max(Xn.shape[-2:]))
        h = value / a
        # h[a_i, a_j] = (g_ij - h_j) / a_i: its rounding error is multiplied by |P_i| ~ sqrt(a_i) twice
        slope = first.sub_(h[..., None, :]).div_(a[..., :, None])
        P = Xn @ W
        return (P * h[..., None, :]) @ P.mT, (P, W, h, slope, b / a)

    def gram_gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """D Xn = (G P diag(h) + P (h[a_i, a_j] H_ij + s I)) W^T, H = P^T G P = (sqrt(a_i a_j) G~_ij)."""
        P, W, h, slope, weight = saved
        GP = G @ P
        H = P.mT @ GP
        s = (weight * H.diagonal(dim1=-2, dim2=-1)).sum(-1, keepdim=True)
        H = H.mul_(slope)
        H.diagonal(dim1=-2, dim2=-1).add_(s)
        return GP.mul_(h[..., None, :]).add_(P @ H) @ W.mT


@dataclass(frozen=True)
class Products:
    """The kernel of K Newton-Schulz steps by matrix products, for the root only."""

    function: NewtonSchulz

    def root(self, A: Tensor, t: Tensor) -> tuple[Tensor, Saved]:
        """Z = sqrt(t) y_K(A) `[..., C, C]` by K Newton-Schulz steps in matrix products, and the iterates for `root_gradient`."""
        root = t.sqrt()
        y, chain = iterate(A, self.function.num_iter, inverse=False)
        return y * root, (y, root, *chain)

    def root_gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """D = dA + (<G, Z> / 2 - <dA, A>) I `[..., C, C]` with dA = dL/dA pulled back through the iterates."""
        y, root, *chain = saved
        A = chain[0]
        G = G * root
        dA = pull_back(G, tuple(chain), inverse=False)
        s = (G * y).sum((-2, -1)) / 2 - (dA * A).sum((-2, -1))
        dA.diagonal(dim1=-2, dim2=-1).add_(s[..., None])
        return dA

    def gram(self, Xn: Tensor, t: Tensor) -> tuple[Tensor, Saved]:
        """Z = sqrt(t) Xn z_K(K) Xn^T `[..., C, C]` by Newton-Schulz steps on K = Xn^T Xn, and what `gram_gradient` needs."""
        root = t.sqrt()
        z, chain = iterate(Xn.mT @ Xn, self.function.num_iter, inverse=True)
        z = z * root
        return (Xn @ z) @ Xn.mT, (Xn, z, root, *chain)

    def gram_gradient(self, G: Tensor, saved: Saved) -> Tensor:
        """D Xn = G Xn z + Xn dK + s Xn, s = <G, Z> / 2 - <D0, A> for D0 = D without s."""
        Xn, z, root, *chain = saved
        GX = G @ Xn
        dK = pull_back((Xn.mT @ GX) * root, tuple(chain), inverse=True)
        GXz = GX @ z
        out = GXz + Xn @ dK
        s = (GXz * Xn).sum((-2, -1), keepdim=True) / 2 - (out * Xn).sum((-2, -1), keepdim=True)
        return out.add_(s * Xn)
