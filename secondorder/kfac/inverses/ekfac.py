"""EKFAC: in the eigenbases of the K-FAC factors, the products beta alpha^T give way to the gradients' own second moments.

    S = scale sum_n (Q_B^T (sum_t g_nt a_nt^T) Q_A)^2      P W = Q_B [(Q_B^T W Q_A) / (S + lambda)] Q_A^T

T. George, C. Laurent, X. Bouthillier, N. Ballas, P. Vincent, "Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis", NeurIPS 2018. S is a bias-corrected moving average; before its first update it is beta alpha^T.
When the bases are renewed, from Q to Q', S is carried over: the diagonal of Q diag(S) Q^T in the new bases is
(Q'_B^T Q_B)^2 S (Q_A^T Q'_A)^2, squared entry by entry, the nearest diagonal in Frobenius norm.

Index letters: N samples, T positions, G groups, D inputs and O outputs of a group. `squared_gradients` makes the sums.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from secondorder.curvature.relative_damping import safe_scale, weighted_mean_eigenvalue
from secondorder.kfac.inverses.diagonal import product, times, times_right, transposed
from secondorder.kfac.inverses.eigenbasis import Rotated, joined
from secondorder.kfac.inverses.inverse import Factors, Inverse, Recipe
from secondorder.kfac.inverses.numerics import Eigen, Problem


@dataclass(eq=False)
class CorrectedEigenbasis(Rotated):
    """Q_B `[G, O, O]`, Q_A `[G, D, D]`, S `[G, O, D]`, its scale sum S^2 / sum S `[G, 1, 1]`, and the weight of the updates so
    far, 0 to 1."""

    kind = "ekfac"
    shapes = MappingProxyType({"Q_B": "GOO", "Q_A": "GDD", "S": "GOD", "scale": "G11"})
    Q_B: Tensor
    Q_A: Tensor
    S: Tensor
    scale: Tensor
    weight: float

    def damped_eigenvalues(self, added: Tensor | float) -> Tensor:
        """S + lambda `[G, O, D]`, a new tensor, for lambda = `added`."""
        return self.S + added

    def update(self, S: Tensor, ema_decay: float) -> None:
        """Take a step's second moments S `[G, O, D]` into the average of decay `ema_decay`; the first replace beta alpha^T."""
        weight = ema_decay * self.weight + (1 - ema_decay)
        self.S = torch.lerp(self.S, S.to(self.S.dtype), (1 - ema_decay) / weight)
        self.scale = safe_scale(weighted_mean_eigenvalue(self.S, self.S.sum((1, 2))))
        self.weight = weight

    def carried(self, other: "CorrectedEigenbasis") -> None:
        """Take over S and its weight from an inverse in other bases, carried over to these."""
        left, right = product(transposed(self.Q_B), other.Q_B), product(transposed(other.Q_A), self.Q_A)
        self.S = times_right(times(left.square_(), other.S), right.square_())
        self.scale = safe_scale(weighted_mean_eigenvalue(self.S, self.S.sum((1, 2))))
        self.weight = other.weight


def corrected_eigenbasis(layer: Factors, previous: Inverse | None) -> Recipe:
    """The recipe of new bases of two factors A and B, with S of the previous inverse carried over where there is one."""

    def make(B: Eigen, A: Eigen) -> CorrectedEigenbasis:
        basis = joined(layer, B, A)
        made = CorrectedEigenbasis(basis.Q_B, basis.Q_A, basis.eigenvalues(), basis.scale, 0.0)
        if isinstance(previous, CorrectedEigenbasis) and previous.weight > 0 and previous.S.shape == made.S.shape:
            made.carried(previous)
        return made

    return Recipe([Problem(layer.B), Problem(layer.given)], make)
