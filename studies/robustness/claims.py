"""What the robustness study compares between heads: from its records to one value for each network, head and seed.

Relative errors are in units of the mean GAP network: R_sc, its error on corruption c at severity s, and R_clean are means over
seeds. A corruption by which that network loses nothing has no relative error and is left out, for every head.
"""

from collections.abc import Hashable
from functools import partial

import numpy as np
import pandas as pd
from scipy.special import logit

from secondorder.robustness import CORRUPTIONS, SEQUENCES, relative_mean_corruption_error
from studies.judge import Claim, contrast, primary
from studies.judge.claims import Values
from studies.judge.matched import KEYS, at_matched
from studies.robustness.measures import CLEAN, CORRUPTED, FLIPS, TOP5

GROUPS = tuple(dict.fromkeys(row.group for row in CORRUPTIONS.values()))
EXTRA = [name for table in (CORRUPTIONS, SEQUENCES) for name, row in table.items() if row.extra]
"""Corruptions and sequences outside of the benchmark, which enter no mean."""


def of_quantity(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The records of a quantity, of corruptions and sequences of the benchmark."""
    return records[(records.quantity == quantity) & ~records.layer.isin(EXTRA)]


def clean_error(records: pd.DataFrame) -> pd.DataFrame:
    """The error on clean images (KEYS, value)."""
    return of_quantity(records, CLEAN)[[*KEYS, "value"]]


def mean(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The mean of an error, of flips or of distances over corruptions and severities, or sequences (KEYS, value)."""
    return of_quantity(records, quantity).groupby(KEYS, sort=False).value.mean().reset_index()


def losses(records: pd.DataFrame) -> pd.DataFrame:
    """What each network loses by each corruption (KEYS, layer, value): its mean error over severities - its clean error."""
    errors = of_quantity(records, CORRUPTED).groupby([*KEYS, "layer"], sort=False).value.mean().reset_index()
    table = errors.merge(clean_error(records), on=KEYS, suffixes=("", "_clean"))
    return table.assign(value=table.value - table.pop("value_clean"))


def mean_loss(records: pd.DataFrame, group: str = "") -> pd.DataFrame:
    """The mean of `losses` over all corruptions, or those of a group (KEYS, value)."""
    table = losses(records)
    table = table[table.layer.isin([name for name, row in CORRUPTIONS.items() if group in ("", row.group)])]
    return table.groupby(KEYS, sort=False).value.mean().reset_index()


def counted(records: pd.DataFrame) -> list[str]:
    """The corruptions by which the mean GAP network of one architecture, of those with all corruptions, loses something."""
    table = losses(records)
    of_gap = table[table["head"] == "gap"].pivot(index=KEYS, columns="layer", values="value")
    found = of_gap.reindex(columns=table.layer.unique()).dropna().mean()
    return found.index[found > 0].tolist()


def relative(records: pd.DataFrame) -> pd.DataFrame:
    """The relative mCE (KEYS, value) of every network with all corruptions, in units of the mean GAP network."""
    parts = [_relative(part) for _, part in records.groupby("network", sort=False)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*KEYS, "value"])


def _relative(records: pd.DataFrame) -> pd.DataFrame:
    """`relative` of one architecture."""
    names = counted(records)
    errors = of_quantity(records, CORRUPTED)
    table = errors.pivot(index=KEYS, columns=["layer", "index"], values="value").dropna()
    clean = clean_error(records).set_index(KEYS).value.dropna()
    table = table[table.index.isin(clean.index)]
    of_each: dict[Hashable, float] = clean.to_dict()
    gap = table.index.get_level_values("head") == "gap"
    if not gap.any() or not names:
        return pd.DataFrame(columns=[*KEYS, "value"])
    reference, reference_clean = _table(table[gap].mean(), names), float(clean[table.index[gap]].mean())
    values = [
        relative_mean_corruption_error(_table(row, names), of_each[key], reference, reference_clean)
        for key, row in table.iterrows()
    ]
    return table.index.to_frame(index=False).assign(value=values)


def _table(errors: pd.Series, names: list[str]) -> dict[str, list[float]]:
    """Corruption -> errors by severity."""
    return {name: errors[name].sort_index().tolist() for name in names}


def at_matched_accuracy(records: pd.DataFrame) -> pd.DataFrame:
    """The relative mCE (KEYS, value) that each network would have with the mean clean error of its architecture.

    Analysis of covariance (`at_matched`) of log relative mCE on logit(clean error).
    """
    table = relative(records).merge(clean_error(records), on=KEYS, suffixes=("", "_clean"))
    table = table[(table.value > 0) & table.value_clean.between(0, 1, inclusive="neither")]
    found = at_matched(table[KEYS].assign(x=logit(table.value_clean), y=np.log(table.value)))
    return found[KEYS].assign(value=np.exp(found.y.astype(float)))


SAYS = {
    "supported": "Corruptions cost a GCP network less of its accuracy.",
    "contradicted": "Corruptions cost a GCP network more of its accuracy.",
    "no effect": "Corruptions cost a network as much of its accuracy under both heads.",
}


def _contrast(name: str, values: Values, of: str = "gcp", to: str = "gap") -> Claim:
    return contrast(name, "robustness", name, values, of, to, margin=0.05)


PAIRS = (("gcp", "gap_lifted"), ("gap_lifted", "gap"), ("gcp", "covariance"), ("covariance", "gap"))
MATCHED, *OTHERS = [
    _contrast("relative mCE at matched clean error", at_matched_accuracy),
    _contrast("clean error", clean_error),
    _contrast("mean error on corrupted images", partial(mean, quantity=CORRUPTED)),
    _contrast("mean loss by corruptions", mean_loss),
    *(_contrast(f"mean loss by {group}", partial(mean_loss, group=group)) for group in GROUPS),
]
CONTROLS = [MATCHED, *(_contrast("relative mCE", relative, *pair) for pair in PAIRS)]
STABILITY = [
    _contrast(f"mean {name}", partial(mean, quantity=name), *pair)
    for name in (FLIPS, TOP5)
    for pair in (("gcp", "gap"), *PAIRS[:2])
]
CLAIMS = [primary(8).measured(relative, SAYS), *CONTROLS, *OTHERS, *STABILITY]
