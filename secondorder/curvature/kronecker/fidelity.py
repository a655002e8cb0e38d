"""How well approximate curvature blocks (K-FAC, EKFAC, diagonal) match the exact ones.

For an approximation A of an exact block B, in the Frobenius inner product,

    cosine           <A, B> / (|A| |B|)              the directions agree, whatever the scale
    relative error   |A - B| / |B|
    best scale       s = <A, B> / <A, A>             the factor that brings A nearest to B
    scaled error     |s A - B| / |B| = sqrt(1 - cosine^2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secondorder.curvature.operators import SymmetricOperator
from secondorder.curvature.spectrum.difference import root_ratio
from secondorder.curvature.spectrum.estimate import Estimate
from secondorder.curvature.spectrum.frobenius_products import frobenius_products
from secondorder.errors import InputError, unknown
from secondorder.optional import needed_by

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Fidelity:
    """How well an approximation A fits an exact block B, in the Frobenius inner product, with standard errors (0 when exact).

    Args:
        size: rows P of the block.
        method: "dense" (exact), "structured" (exact; errors below 1e-8 are rounding) or "stochastic".
        cosine: <A, B> / (|A| |B|). relative_error: |A - B| / |B|.
        best_scale: s = <A, B> / <A, A>. scaled_error: |s A - B| / |B|.
    """

    size: int
    method: str
    cosine: Estimate
    relative_error: Estimate
    best_scale: Estimate
    scaled_error: Estimate

    def row(self) -> dict[str, float | int | str]:
        """One row of a table, column -> value: size, method, each number of the fidelity, and its error as `<name>_error`."""
        row: dict[str, float | int | str] = {"size": self.size, "method": self.method}
        for name, estimate in vars(self).items():
            if isinstance(estimate, Estimate):
                row |= {name: estimate.value, f"{name}_error": estimate.error}
        return row


def fidelity(
    approximate: SymmetricOperator,
    exact: SymmetricOperator,
    method: str = "auto",
    *,
    probes: int = 20,
    seed: int = 0,
    memory: int | None = None,
) -> Fidelity:
    """The fidelity of one approximate block `[P, P]` to the exact one: cosine, relative error, best scale and error at it.

    A zero block has cosine 0 with everything; errors against a zero exact block are infinite, or 0 when both are zero.

    Args:
        approximate, exact: the two blocks, of one size, number format and device.
        method: "auto" is exact where both are stored (rows, Kronecker factors, bases, diagonals, matrices) or have at most 2048
            rows, and else "stochastic", from probes shared by both; "exact" raises InputError rather than use probes.
        probes: random vectors of "stochastic"; blocks of at most 4 `probes` rows are always exact.
        seed: of the probes.
        memory: bytes of their vectors; None: what is available, and 2 GiB at least.

    Raises:
        InputError: for blocks of different size, number format or device, bad arguments, and too little memory.
        NonFiniteError: for NaN or infinity in a block.
    """
    found = frobenius_products(approximate, exact, method, probes, seed, memory)
    products = (found.first, found.mixed, found.second)
    scale = found.best_scale
    return Fidelity(
        size=exact.size,
        method=found.method,
        cosine=found.statistic(_cosine, *products),
        relative_error=found.statistic(root_ratio, found.difference(1.0), found.second),
        best_scale=scale,
        # at the best scale the error does not change with the scale to first order: it may be held fixed
        scaled_error=found.statistic(root_ratio, found.difference(scale.value), found.second),
    )


def fidelity_table(
    approximate_blocks: Mapping[str, SymmetricOperator],
    exact_blocks: Mapping[str, SymmetricOperator],
    method: str = "auto",
    *,
    probes: int = 20,
    seed: int = 0,
    memory: int | None = None,
) -> pd.DataFrame:
    """A pandas table with a row of `fidelity`, whose arguments it has, for each parameter of `approximate_blocks`, in its order.

    Raises InputError when there is no block, and for a parameter without an exact block.
    """
    with needed_by("fidelity_table"):
        import pandas as pd
    for name in approximate_blocks:
        if name not in exact_blocks:
            raise unknown("parameter among the exact blocks", name, list(exact_blocks) or ["(none)"])
    if not approximate_blocks:
        raise InputError("needs at least one approximate block, got none")
    rows = {
        name: fidelity(block, exact_blocks[name], method, probes=probes, seed=seed, memory=memory).row()
        for name, block in approximate_blocks.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("parameter")


def _cosine(aa: float, ab: float, bb: float) -> float:
    return ab / (math.sqrt(aa) * math.sqrt(bb)) if aa > 0 and bb > 0 else 0.0
