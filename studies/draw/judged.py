"""Judged claims as rows of the tables that the forest figures draw."""

import math
from typing import Any

import numpy as np
import pandas as pd

from studies.draw.numbers import estimate_words
from studies.judge import Claim, Judged

Interval = tuple[float, float, float]
"""Estimate, low and high end; nan for what was not measured, and for ends that no scatter was seen for."""


def forest_row(claim: Claim, dataset: str, outcome: str, interval: Interval) -> dict[str, Any]:
    """The row of a forest table with an estimate.

    Args:
        claim: what was claimed, with the zone of practical equivalence.
        dataset: on which it was judged.
        outcome: the word that came out, or "".
        interval: estimate, low and high end.
    """
    low, high = claim.compare.zone
    return {
        "claim": claim.name,
        "primary": claim.primary,
        "dataset": dataset,
        "network": "",
        "seed": -1,
        **dict(zip(("estimate", "low", "high"), map(float, interval), strict=True)),
        "outcome": outcome,
        "claimed": claim.compare.claimed,
        "zone_low": low,
        "zone_high": high,
        "reference": (low + high) / 2,
        # a ratio, or a positive value: then the zone lies around a positive number
        "log": claim.compare.scale == "log" and low > 0,
        "numbers": estimate_words(*interval),
    }


def seed_rows(row: dict[str, Any], by_seed: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of the single seeds behind an estimate (columns network, seed, effect) that has the row `row`."""
    single = row | {"low": math.nan, "high": math.nan, "numbers": ""}
    return [single | {"network": p.network, "seed": p.seed, "estimate": p.effect} for p in by_seed.itertuples()]


def case_rows(case: Judged, outcome: str = "") -> list[dict[str, Any]]:
    """The rows of a judged claim that was measured: its estimate, and each seed's."""
    assert case.estimate is not None
    row = forest_row(case.claim, case.dataset, outcome, case.estimate.seen)
    return [row, *seed_rows(row, case.estimate.by_seed)]


def in_margins(table: pd.DataFrame) -> pd.DataFrame:
    """A forest table in units of the margin of practical equivalence: 0 is no effect, above 1 as claimed, below -1 the contrary.

    t = +-(v - reference) / (end of the zone on that side - reference), of logarithms where `log`; + where "above" is claimed, or
    "within" the zone. Nan where a claim has no margin.
    """
    log, below = table[["log"]].to_numpy(dtype=bool), (table.claimed == "below").to_numpy()
    values = table[["estimate", "low", "high", "zone_low", "zone_high", "reference"]].to_numpy(dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(log, np.log(np.maximum(values, 0.0)), values)
        distance = values[:, :5] - values[:, 5:]
        size = np.where(distance < 0, -distance[:, 3:4], distance[:, 4:5])
        margins = np.where(size > 0, distance / size, np.nan) * np.where(below, -1.0, 1.0)[:, None]
    return table.assign(
        estimate=margins[:, 0],
        low=np.where(below, margins[:, 2], margins[:, 1]),
        high=np.where(below, margins[:, 1], margins[:, 2]),
        zone_low=-1.0,
        zone_high=1.0,
        reference=0.0,
        log=False,
        claimed=np.where(below, "above", table.claimed),
    )
