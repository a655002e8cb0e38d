"""What the section and the figures of part D read from the table: one number for each seed and head, and its interval."""

from collections.abc import Iterable

import numpy as np
import pandas as pd

from studies.preconditioning.blocks.measure import CONVOLUTIONS, LAST
from studies.preconditioning.reading import backbone_name
from studies.preconditioning.situation import UNTRAINED

HALF_RANK, TO_MEAN = "half_rank_condition", "largest_to_mean"
MEASURES = {HALF_RANK: "λ₁ / λₖ at half of the possible rank", TO_MEAN: "largest / mean eigenvalue"}
ONLY_LAST = (LAST,)


def phase_name(backbone: str) -> str:
    """How a backbone is called in claims, tables and figures."""
    return "untrained backbone" if backbone == UNTRAINED else f"backbone {backbone_name(backbone)}"


def per_seed(
    table: pd.DataFrame, setting: str, measure: str, layers: Iterable[str] = CONVOLUTIONS, index: str = "seed"
) -> pd.DataFrame:
    """The geometric mean over the layers for each seed (rows; or other `index`) and head (columns).

    NaN where a layer has no positive finite value, so that nothing is hidden in a mean.
    """
    layers = tuple(layers)
    some = table[(table.setting == setting) & (table.measure == measure) & table.layer.isin(layers)]
    logs = np.log(some.value.where((some.value > 0) & np.isfinite(some.value)))
    groups = logs.groupby([some[index], some["head"]])
    means = groups.mean().where(groups.count() == len(layers))  # a missing layer has no row, or no number
    return np.exp(means).unstack("head")


def ratio(numerator: pd.DataFrame, denominator: pd.DataFrame, head: str, other: str) -> pd.Series:
    """head / other for each seed that has both."""
    if head not in numerator.columns or other not in denominator.columns:
        return pd.Series(dtype=float)
    return (numerator[head] / denominator[other]).dropna()
