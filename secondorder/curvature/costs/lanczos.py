"""What Lanczos takes beside its products, by hand: orthogonalisation and vectors of `spectral_summary` with its default steps.

Index letters: P rows, K probes, M steps, L eigenvalues that are computed by themselves, C vectors of a Krylov basis.
"""

from typing import NamedTuple

from secondorder.curvature.spectrum.lanczos import SEARCH
from secondorder.curvature.spectrum.products import DEFLATE, DOUBLE, MAX_ITERATIONS, PROBES, STEPS


class LanczosCount(NamedTuple):
    """Products with single vectors, products (`runs`) with several (`probes`), FLOPs and bytes of what is beside them."""

    single: int
    runs: int
    probes: int
    flops: float
    nbytes: float

    @property
    def products(self) -> int:
        """How many vectors Lanczos and the trace estimate multiply the operator with."""
        return self.single + self.runs * self.probes


def lanczos_counts(P: int, room: int) -> tuple[LanczosCount, LanczosCount]:
    """The least that a summary takes, and the most: how soon the extreme eigenvalues converge is not known before.

    room: vectors `[P]` that may be held.
    """
    M, L = min(STEPS, P), min(DEFLATE, P - 1)
    K = max(1, min(PROBES, room // (M + 4)))
    # A vector is orthogonalised twice against all before it and the L: 8 P FLOPs for each of these.
    probes = PROBES * P * (4 * M * (M + 1) + 8 * M * L)
    counts = []
    for longest in (False, True):
        single, flops = 0, float(probes)
        for k in (L, 1, 1) if L else (1, 1):
            steps = min(P, MAX_ITERATIONS if longest else k + 1 + SEARCH)
            C = min(P, max(3 * k, k + 60))
            single += steps + k  # k for the residuals
            flops += 10 * P * steps * min(steps, C)  # 2 of these for restarts
        counts.append(LanczosCount(single, M * -(-PROBES // K), K, flops, (K * (M + 4) + L) * P * DOUBLE))
    return counts[0], counts[1]
