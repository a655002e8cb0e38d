"""What the curvature study compares between heads, and the means that it prints: from ``curvature.csv`` to ratios."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pandas as pd

from studies.report.style import label
from studies.statistics import Comparison, ratio_interval

PHASES = {
    "initial": "same initial weights",
    "trained": "after training",
    "shared: gap": "backbone trained under GAP",
    "shared: gcp": "backbone trained under GCP",
}
WEIGHTS = ("first", "middle", "last")
"""The convolutions, over which a quantity is averaged."""
LAST = ("last",)


@dataclass(frozen=True)
class Quantity:
    """A measure of a matrix in the table, its name for a reader, and the blocks whose geometric mean is compared."""

    matrix: str
    measure: str
    name: str
    blocks: Collection[str] = WEIGHTS


QUANTITIES = {
    "half_rank_condition": Quantity("GGN", "half_rank_condition", "λ₁ / λₖ at half of the possible rank"),
    "largest_to_mean": Quantity("GGN", "largest_to_mean", "largest / mean eigenvalue"),
    "condition": Quantity("GGN", "condition", "condition number on the range"),
    "largest": Quantity("GGN", "largest", "largest GGN eigenvalue"),
    "trace": Quantity("GGN", "trace", "trace of the GGN"),
    "effective_rank": Quantity("GGN", "effective_rank", "effective rank of the GGN"),
    "hessian": Quantity("Hessian", "largest", "largest Hessian eigenvalue, last conv.", LAST),
    "kfac": Quantity("K-FAC (expand)", "cosine", "cosine of K-FAC, last conv.", LAST),
    "ekfac": Quantity("EKFAC", "cosine", "cosine of EKFAC, last conv.", LAST),
}
"""What is compared with GAP as a ratio."""
DIFFERENCE = Quantity("GGN to Hessian", "relative_difference", "‖H − G‖ / ‖H‖")
"""Zero up to rounding under GAP, so that it has no ratio to it."""
CONDITIONS = ("half_rank_condition", "largest_to_mean")
COLUMNS = ("backbone", "pooling", "seed", "phase", "step", "block", "matrix", "measure", "value", "error")
Values = pd.DataFrame


def values(table: pd.DataFrame, backbone: str, phase: str, quantity: Quantity) -> Values:
    """One row for each seed and one column for each head: the geometric mean over the quantity's blocks.

    NaN where a value is missing, not finite or not positive, so that nothing is hidden in a mean.
    """
    some = table[
        (table.backbone == backbone)
        & (table.phase == phase)
        & (table.matrix == quantity.matrix)
        & (table.measure == quantity.measure)
        & table.block.isin(quantity.blocks)
    ]
    logs = np.log(some.value.where((some.value > 0) & np.isfinite(some.value)))
    means = logs.groupby([some.seed, some.pooling]).agg(lambda block: block.mean(skipna=False))
    return means.unstack("pooling").pipe(np.exp)


def compare(
    table: pd.DataFrame, backbone: str, phase: str, quantity: str, *, pooling: str = "gcp", reference: str = "gap"
) -> Comparison | None:
    """The ratio of a head to another over seeds; None when one of them was not measured."""
    found = values(table, backbone, phase, QUANTITIES[quantity])
    if not {pooling, reference} <= set(found.columns):
        return None
    return Comparison(pooling, f"{backbone} {phase}", quantity, ratio_interval(found[pooling], found[reference]))


def all_comparisons(table: pd.DataFrame) -> list[Comparison]:
    """Every head relative to GAP in every quantity, for every backbone and phase."""
    found = [
        compare(table, backbone, phase, quantity, pooling=pooling)
        for backbone in table.backbone.unique()
        for phase in PHASES
        for quantity in QUANTITIES
        for pooling in table.pooling.unique()
        if pooling != "gap"
    ]
    return [one for one in found if one is not None]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Geometric means over blocks and seeds of all quantities, for each backbone, phase and head; empty if not measured."""
    rows = []
    for backbone in table.backbone.unique():
        for phase, phase_name in PHASES.items():
            found = {q.name: values(table, backbone, phase, q) for q in (*QUANTITIES.values(), DIFFERENCE)}
            measured = found[QUANTITIES["condition"].name]
            for pooling in (p for p in table.pooling.unique() if p in measured.columns):
                row: dict[str, object] = {"backbone": backbone, "weights": phase_name, "head": label(pooling)}
                for name, each in found.items():
                    row[name] = f"{np.exp(np.log(each[pooling]).mean()):.3g}" if pooling in each.columns else ""
                rows.append(row | {"n": len(measured)})
    return pd.DataFrame(rows)
