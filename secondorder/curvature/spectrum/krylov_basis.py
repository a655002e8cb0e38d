"""An orthonormal basis that grows by products with an operator.

Index letters: P rows of the operator, M basis vectors, B vectors multiplied at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.accelerator import check_float64
from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.products import gaussian, norm, product
from secondorder.matrix_power.decomposition import symmetric_eigen

BREAKDOWN = 1e-13  # relative length below which a new direction is rounding error


class RitzPairs(NamedTuple):
    """Eigenvalues `[M]` of A on the basis, their coefficients in it `[M, M]`, and || A v - theta v || `[M]`, on the CPU."""

    values: Tensor
    coefficients: Tensor
    residuals: Tensor


class KrylovBasis:
    """Orthonormal vectors Q `[M, P]` and T = Q A Q^T, grown by A times its newest vectors (block Lanczos).

    Every vector is orthogonalised twice against all others, and T holds all coefficients, not only the band that would be
    nonzero in exact arithmetic. A direction that is rounding error, because the basis is invariant under A, is replaced by
    a random one. The newest `count - done` vectors are not yet multiplied; A Q[:done] lies in the span of all.
    """

    def __init__(self, operator: SymmetricOperator, capacity: int, block: int, source: torch.Generator) -> None:
        self.operator = operator
        self.size = operator.size
        self.capacity = capacity
        self.block = block
        self.source = source
        check_float64(operator.device, "a spectral estimate")
        self.Q = torch.zeros(capacity, self.size, dtype=torch.float64, device=operator.device)
        self.T = torch.zeros(capacity, capacity, dtype=torch.float64)
        self.count = 0
        self.done = 0
        self.products = 0
        self.scale = 0.0  # largest || A q ||, at most || A ||
        self._add_random(block)

    @property
    def complete(self) -> bool:
        """Whether the multiplied vectors span the whole space of P dimensions."""
        return self.done == self.size

    @property
    def full(self) -> bool:
        """Whether there is no room for another block of vectors within the capacity."""
        return min(2 * self.count - self.done, self.size) > self.capacity

    def expand(self) -> None:
        """Multiply the newest vectors by A and append the directions that are new in the products."""
        newest = range(self.done, self.count)
        AQ = product(self.operator, self.Q[self.done : self.count].mT)
        self.products += len(newest)
        for column, w in zip(newest, AQ.mT.contiguous(), strict=True):
            self.scale = max(self.scale, float(norm(w, 0)))
            w, coefficients = self._orthogonal(w)
            self.T[: self.count, column] = coefficients.cpu()
            length = float(norm(w, 0))
            if self.count == self.size:
                continue
            if length > BREAKDOWN * self.scale:
                self.T[self.count, column] = length
                self._append(w / length)
            else:
                self._add_random(1)
        self.done = newest.stop

    def ritz(self) -> RitzPairs:
        """The eigenpairs of A on the span of the multiplied vectors, ascending, with their residual norms."""
        T = self.T[: self.done, : self.done]
        values, Y = symmetric_eigen((T + T.mT) / 2)
        coupling = self.T[self.done : self.count, : self.done]  # (A Q - Q T) in the newest vectors
        return RitzPairs(values, Y, norm(coupling @ Y, 0) if len(coupling) else values.new_zeros(len(values)))

    def vectors(self, Y: Tensor) -> Tensor:
        """The vectors `[K, P]` with coefficients Y `[M, K]` in the multiplied vectors."""
        return Y.mT.to(self.Q.device) @ self.Q[: self.done]

    def restart(self, values: Tensor, Y: Tensor, fresh: bool) -> None:
        """Shrink to the Ritz vectors with coefficients Y `[M, K]` and go on from the newest vectors (thick restart).

        With `fresh`, go on from random vectors instead; they meet what the old ones were blind to.
        """
        K, waiting = len(values), self.count - self.done
        coupling = self.T[self.done : self.count, : self.done] @ Y
        newest = self.Q[self.done : self.count].clone()
        self.Q[:K] = self.vectors(Y)
        self.T.zero_()
        self.T[:K, :K] = values.diag()
        self.done = self.count = K
        if fresh:
            self._add_random(self.block)
        else:
            self.T[K : K + waiting, :K] = coupling
            self.Q[K : K + waiting] = newest
            self.count += waiting

    def _orthogonal(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """w without its part in the basis, and the coefficients of that part."""
        Q = self.Q[: self.count]
        first = Q @ w
        w = w - first @ Q
        second = Q @ w
        return w - second @ Q, first + second

    def _append(self, unit: Tensor) -> None:
        self.Q[self.count] = unit
        self.count += 1

    def _add_random(self, vectors: int) -> None:
        for w in gaussian(self.operator, min(vectors, self.size - self.count), self.source).mT:
            w = self._orthogonal(w)[0]
            w = self._orthogonal(w / w.norm())[0]
            self._append(w / w.norm())
