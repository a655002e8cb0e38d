"""Stochastic Lanczos quadrature: eigenvalue nodes and weights seen by random vectors.

For a unit vector v, M steps of Lanczos give nodes theta_m and weights w_m with  v^T f(A) v ~ sum_m w_m f(theta_m), exact for
polynomials of degree 2 M - 1. Index letters: P rows, K probes, M steps, L vectors that are left out, X points.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.krylov_basis import BREAKDOWN
from secondorder.curvature.spectrum.products import gaussian, norm, product
from secondorder.matrix_power.decomposition import symmetric_eigen

HUGE = 1e150
"""A value of a polynomial that may be squared without overflow."""


@dataclass(frozen=True)
class Quadrature:
    """Nodes, weights and residuals `[K, M]` of K probes, and the Jacobi matrices T of which the nodes are the eigenvalues.

    The weights of a probe sum to 1. An eigenvalue lies within the residual || A y - theta y || of each node with a weight.
    diagonal `[K, M]`; off_diagonal `[K, M]`, of which the last entry leads to the vector that would come next; zeros follow the
    end of an exhausted Krylov space.
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    diagonal: Tensor
    off_diagonal: Tensor

    def up_to(self, x: Tensor) -> Tensor:
        """The weight `[K, X]` of each probe's nodes <= x at each point of x `[X]`, 0 to 1."""
        sums = torch.nn.functional.pad(self.weights.cumsum(1), (1, 0))  # the nodes are in ascending order
        return sums.gather(1, torch.searchsorted(self.nodes, x.expand(len(sums), -1).contiguous(), right=True))

    def unseen(self, x: Tensor) -> Tensor:
        """The Christoffel function 1 / sum_m p_m(x)^2 `[K, X]` of degree M (`counting_bounds`); 0 for an exhausted probe."""
        before = torch.zeros(len(self.nodes), len(x), dtype=x.dtype)
        now, total, inverse = (torch.ones_like(before) for _ in range(3))
        previous = torch.zeros(len(self.nodes), 1, dtype=x.dtype)
        ended = torch.zeros_like(previous, dtype=torch.bool)
        for m in range(self.nodes.shape[1]):
            beta = self.off_diagonal[:, m, None]
            ended = ended | (beta == 0)
            new = ((x - self.diagonal[:, m, None]) * now - previous * before) / torch.where(ended, 1, beta)
            # from here on in units of the largest polynomial so far: they grow without end in gaps
            size = new.abs().clamp(1, HUGE)
            before, now, previous = now / size, new.clamp(-HUGE, HUGE) / size, beta
            total, inverse = total / size.square() + now.square(), inverse / size.square()
        return torch.where(ended, 0, inverse / total)


def joined(parts: Sequence[Quadrature]) -> Quadrature:
    """One quadrature of all probes of several runs, one run after the other."""
    return Quadrature(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Quadrature)))


def lanczos_quadrature(
    operator: SymmetricOperator, probes: int, steps: int, without: Tensor, source: torch.Generator
) -> Quadrature:
    """The quadrature `[K, M]` of K = `probes` random unit vectors orthogonal to `without` `[L, P]`, by M = `steps` steps.

    The K probes run side by side, their products in one call. Each new vector is orthogonalised twice against its probe's
    own and against `without`. A probe whose Krylov space is exhausted goes on with zero vectors, of weight zero.
    """
    size, device = operator.size, operator.device
    Q = torch.zeros(probes, steps, size, dtype=torch.float64, device=device)
    diagonal = torch.zeros(probes, steps, dtype=torch.float64, device=device)
    off_diagonal = torch.zeros(probes, steps, dtype=torch.float64, device=device)
    scale = torch.zeros(probes, dtype=torch.float64, device=device)
    q = gaussian(operator, probes, source).mT
    q = _orthogonal(_orthogonal(q, Q[:, :0], without), Q[:, :0], without)
    q = q / q.norm(dim=1, keepdim=True)
    for m in range(steps):
        Q[:, m] = q
        w = product(operator, q.mT).mT
        scale = torch.maximum(scale, norm(w, 1))
        diagonal[:, m] = (q * w).sum(1)
        w = _orthogonal(_orthogonal(w, Q[:, : m + 1], without), Q[:, : m + 1], without)
        length = norm(w, 1)
        alive = length > BREAKDOWN * scale
        if not alive.any():
            break
        off_diagonal[:, m] = torch.where(alive, length, 0)
        q = torch.where(alive[:, None], w / length[:, None], 0)
    return _gauss(diagonal.cpu(), off_diagonal.cpu())


def _orthogonal(w: Tensor, Q: Tensor, without: Tensor) -> Tensor:
    """w `[K, P]` without its part in Q `[K, m, P]`, probe by probe, and in `without` `[L, P]`."""
    w = w - (w @ without.mT) @ without
    return w - (w[:, None] @ Q.mT @ Q)[:, 0]


def _gauss(diagonal: Tensor, off_diagonal: Tensor) -> Quadrature:
    """Eigenvalues of tridiagonal matrices and the squared first entries of their eigenvectors (Golub & Welsch 1969)."""
    beside = off_diagonal[:, :-1]
    T = diagonal.diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1)
    nodes, vectors = symmetric_eigen(T)
    residuals = vectors[:, -1].abs() * off_diagonal[:, -1:]
    return Quadrature(nodes, vectors[:, 0].square(), residuals, diagonal, off_diagonal)
