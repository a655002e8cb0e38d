"""Stochastic Lanczos quadrature: eigenvalue nodes and weights seen by random vectors.

For a unit vector v, M steps of Lanczos give nodes theta_m and weights w_m with  v^T f(A) v ~ sum_m w_m f(theta_m), exact for
polynomials of degree 2 M - 1. Index letters: P rows, K probes, M steps, L vectors that are left out.
"""

import torch
from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.krylov_basis import BREAKDOWN
from secondorder.curvature.spectrum.products import gaussian, norm, product


def lanczos_quadrature(
    operator: SymmetricOperator, probes: int, steps: int, without: Tensor, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Nodes and weights `[K, M]`, weights summing to 1, of random unit vectors orthogonal to `without` `[L, P]`.

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
    return _gauss(diagonal.cpu(), off_diagonal[:, :-1].cpu())


def _orthogonal(w: Tensor, Q: Tensor, without: Tensor) -> Tensor:
    """w `[K, P]` without its part in Q `[K, m, P]`, probe by probe, and in `without` `[L, P]`."""
    w = w - (w @ without.mT) @ without
    return w - (w[:, None] @ Q.mT @ Q)[:, 0]


def _gauss(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of tridiagonal matrices and the squared first entries of their eigenvectors (Golub & Welsch 1969)."""
    T = diagonal.diag_embed() + off_diagonal.diag_embed(1) + off_diagonal.diag_embed(-1)
    nodes, vectors = torch.linalg.eigh(T)
    return nodes, vectors[:, 0].square()
