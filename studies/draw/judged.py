"""Judged claims as tidy tables for the forest figures."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from studies.draw.numbers import estimate_words
from studies.judge import Claim, Estimate, Judged

COLUMNS = (
    *("claim", "primary", "dataset", "network", "seed", "estimate", "low", "high", "outcome", "claimed"),
    *("zone_low", "zone_high", "reference", "log", "numbers"),
)
"""Of a forest table: rows with seed -1 are estimates with their intervals, the others single seeds; `numbers` is an estimate
for a reader."""


def interval_of(estimate: Estimate | None) -> tuple[float, float, float]:
    """Estimate, low and high end; nan for what was not measured, and for ends that no scatter was seen for."""
    if estimate is None:
        return (math.nan,) * 3
    ends = (estimate.low, estimate.high) if estimate.has_interval else (math.nan, math.nan)
    return float(estimate.value), float(ends[0]), float(ends[1])


def forest_row(
    claim: Claim, dataset: str, outcome: str, interval: tuple[float, float, float] = (math.nan,) * 3
) -> dict[str, Any]:
    """The row of a forest table with an estimate.

    Args:
        claim: what was claimed, with the zone of practical equivalence.
        dataset: on which it was judged.
        outcome: the word that came out, or "".
        interval: estimate, low and high end; nan where nothing was measured.
    """
    compare = claim.compare
    low, high = compare.zone
    return {
        "claim": claim.name,
        "primary": claim.primary,
        "dataset": dataset,
        "network": "",
        "seed": -1,
        **dict(zip(("estimate", "low", "high"), interval, strict=True)),
        "outcome": outcome,
        "claimed": compare.claimed,
        "zone_low": low,
        "zone_high": high,
        "reference": (low + high) / 2,
        # a ratio, or a positive value: then the zone lies around a positive number
        "log": compare.scale == "log" and low > 0,
        "numbers": estimate_words(*interval),
    }


def forest_table(judged: Iterable[Judged]) -> pd.DataFrame:
    """The table of judged claims that `Forest` and `mini` draw, columns `COLUMNS`: see there."""
    rows: list[dict[str, Any]] = []
    for item in judged:
        estimate = item.estimate
        row = forest_row(item.claim, item.dataset, item.outcome, interval_of(estimate))
        rows.append(row)
        for point in () if estimate is None else estimate.by_seed.itertuples():
            seen = {"network": point.network, "seed": point.seed, "estimate": point.effect}
            rows.append(row | seen | {"low": math.nan, "high": math.nan, "numbers": ""})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def in_margins(table: pd.DataFrame) -> pd.DataFrame:
    """A forest table in units of the margin of practical equivalence: 0 is no effect, above 1 as claimed, below -1 the contrary.

    t = +-(v - reference) / (end of the zone on that side - reference), of logarithms where `log`; + where "above" is claimed, or
    "within" the zone. Nan where a claim has no margin.
    """
    sign = np.where(table.claimed == "below", -1.0, 1.0)
    log = table.log.to_numpy(dtype=bool)

    def scaled(values: "pd.Series[float]") -> np.ndarray:
        v = values.to_numpy(dtype=float)
        return np.where(log, np.log(np.maximum(v, 0.0)), v)

    with np.errstate(divide="ignore", invalid="ignore"):
        reference = scaled(table.reference)
        ends = [np.abs(scaled(table[column]) - reference) for column in ("zone_low", "zone_high")]

        def margins(column: str) -> np.ndarray:
            distance = scaled(table[column]) - reference
            size = np.where(distance < 0, *ends)
            return np.where(size > 0, sign * distance / size, np.nan)

        estimate, first, second = margins("estimate"), margins("low"), margins("high")
    return table.assign(
        estimate=estimate,
        low=np.where(sign < 0, second, first),
        high=np.where(sign < 0, first, second),
        zone_low=-1.0,
        zone_high=1.0,
        reference=0.0,
        log=False,
        claimed=np.where(table.claimed == "below", "above", table.claimed),
    )
