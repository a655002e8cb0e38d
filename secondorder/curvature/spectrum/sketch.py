"""Traces and inner products that are exact on a sketch of the range and leave the rest to chance (Hutch++).

R. Meyer, C. Musco, C. Musco, D. Woodruff, "Hutch++: Optimal Stochastic Trace Estimation", SOSA 2021. With an orthonormal
basis Q of A applied to random vectors, Pi = Q Q^T, and other, independent random vectors u in the complement of Q with
E [u u^T] = 1 - Pi,

    tr A = tr(Pi A) + E [ u^T A u ],    <A, B>_F = tr(Pi A B) + E [ (A u)^T (B u) ],    diag A = diag(A Pi) + E [ u * A u ].

The sketch may be shared by several operators. That u is independent of Q costs a third of the products and makes the K values
for K vectors u independent, so that their spread is an honest error: XTrace (Epperly, Tropp, Webber 2024), which lets each
vector test the sketch of all others, has a smaller error but reports it 1.3 to 1.6 times too small when the sketch matters.

Index letters: P rows, K probes, S = (operators x K) columns of the sketch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.products import affordable, gaussian, product, refuse_memory


class Images(NamedTuple):
    """What an operator makes of a sketch and of the probes: A Q `[P, S]` and A u `[P, K]`."""

    sketch: Tensor
    remainder: Tensor

    def minus(self, other: "Images", scale: float) -> "Images":
        """The images under scale A - B of the same sketch and probes, for those of A (self) and B (other)."""
        return Images(scale * self.sketch - other.sketch, scale * self.remainder - other.remainder)


class Sketch:
    """Q `[P, S]`, probes u `[P, K]` uniform on a sphere in its complement, and the images under each operator.

    `probes` vectors for the sketch of each operator and as many to test it. Needs S < P.
    """

    def __init__(
        self, operators: Sequence[SymmetricOperator], probes: int, source: torch.Generator, memory: int | None
    ) -> None:
        size, S = operators[0].size, len(operators) * probes
        rows = (1 + len(operators)) * (S + probes)
        if affordable(rows, operators[0], memory) < rows:
            raise refuse_memory(rows, operators[0], memory, "take fewer probes, a smaller block, or raise memory")
        omega = gaussian(operators[0], probes, source)
        self.Q = torch.linalg.qr(torch.cat([product(operator, omega) for operator in operators], 1)).Q
        u = gaussian(operators[0], probes, source)
        for _ in range(2):  # once leaves rounding error in the range of A, where A is large
            u = u - self.Q @ (self.Q.mT @ u)
        self.u = u * ((size - S) ** 0.5 / u.norm(dim=0))
        self.images = [Images(product(operator, self.Q), product(operator, self.u)) for operator in operators]

    def trace(self, A: Images) -> Tensor:
        """K independent estimates of tr A, float64 `[K]` on the CPU, from A's images."""
        return ((self.Q * A.sketch).sum() + (self.u * A.remainder).sum(0)).cpu()

    def inner(self, A: Images, B: Images) -> Tensor:
        """K independent estimates of <A, B>_F, float64 `[K]` on the CPU, from the images of both."""
        return ((A.sketch * B.sketch).sum() + (A.remainder * B.remainder).sum(0)).cpu()

    def diagonal(self, A: Images) -> Tensor:
        """K independent estimates of the diagonal of A, float64 `[K, P]` on the CPU, from its images."""
        return ((self.Q * A.sketch).sum(1) + (self.u * A.remainder).mT).cpu()
