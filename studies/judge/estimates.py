"""From a table of values to the effect of a comparison with its t interval over seeds, or over networks.

An effect is computed within each network and seed (`comparisons`), on the comparison's scale. With one network the estimate is
the mean over seeds with Student's interval, mean +- t_{n-1} s / sqrt(n). With k >= 2 networks, n_i seeds and mean effect y_i in
network i, it is a random-effects mean over networks,

    y_i ~ N(mu, tau^2 + s^2 / n_i),    w_i = 1 / (tau^2 + s^2 / n_i),    mean = sum w_i y_i / sum w_i,

with tau^2 by Paule and Mandel and the interval of Hartung and Knapp, mean +- t_{k-1} e where
e^2 = sum w_i (y_i - mean)^2 / ((k - 1) sum w_i).

Assumed are networks drawn from those that the claim is about; effects normal on the scale, independent between networks and
seeds; and one variance s^2 between seeds in every network, pooled because that of a few seeds is a poor weight. Where all
networks have as many seeds, it is the t interval of their means, exact even if variances within differ. Two networks have an
interval of one degree of freedom, 12.7 standard errors to each side: few networks say little about others.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects

from secondorder.errors import InputError
from studies.judge.cells import ABOVE, WITHIN, check_columns, words
from studies.judge.claims import Estimate
from studies.judge.comparisons import Comparison
from studies.judge.scales import SCALES, check_range

KEYS = ["network", "seed"]


@dataclass(frozen=True)
class Effects:
    """The effects of a comparison: table [network, seed, effect] on its scale, and what they lack (see `Estimate`)."""

    table: pd.DataFrame
    center: float
    """Mean of g over the last cell of the contrast: over seeds, then over networks."""
    left_out: int
    censored: int


@dataclass(frozen=True)
class Mean:
    """A mean effect on its scale, with standard error and degrees of freedom; nan where they cannot be known."""

    value: float
    error: float
    freedom: int
    n: int
    """Seeds of the network with fewest."""
    networks: int
    sd: float
    """Standard deviation between seeds within a network, pooled."""
    between: float
    """tau^2, the variance between networks; 0 with one network."""

    def interval(self, confidence: float) -> tuple[float, float]:
        """mean +- t error; infinite ends where there is no error."""
        if not np.isfinite(self.error):
            return -np.inf, np.inf
        half = float(stats.t.ppf(0.5 + confidence / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    def p_above(self, end: float) -> float:
        """p value of "the mean is at most `end`", one-sided; nan where there is no error."""
        return self._tail(self.value - end)

    def p_below(self, end: float) -> float:
        """p value of "the mean is at least `end`", one-sided; nan where there is no error."""
        return self._tail(end - self.value)

    def _tail(self, distance: float) -> float:
        if not np.isfinite(self.error):
            return float("nan")
        if self.error == 0:  # seeds that agree exactly leave no doubt
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / self.error, self.freedom))


def effects_of(compare: Comparison, values: pd.DataFrame) -> Effects | None:
    """The effects in a table of values (columns network, seed, those of the comparison, value, perhaps censored).

    None when no seed of any network has rows in all cells. Raises InputError for a table that lacks columns, holds no numbers, or
    has two values of one cell.
    """
    if isinstance(values, pd.DataFrame) and values.empty:
        return None
    check_columns("the values of a claim", values, [*KEYS, *compare.columns, "value"])
    cells = [_cell(values, dict(cell)) for _, cell in compare.contrast]
    pairs, every = cells[0].index, cells[0].index
    for cell in cells[1:]:
        pairs, every = pairs.intersection(cell.index), every.union(cell.index)
    if pairs.empty:
        return None
    numbers = np.stack([cell.value.loc[pairs].to_numpy() for cell in cells], axis=1)  # [seeds, cells]
    check_range(compare.scale, numbers)
    scaled = SCALES[compare.scale].transformed(np.where(np.isfinite(numbers), numbers, np.nan))
    scaled[~np.isfinite(scaled)] = np.nan
    usable = ~np.isnan(scaled).any(axis=1)
    signs = np.array([sign for sign, _ in compare.contrast], dtype=float)
    every_effect = pairs.to_frame(index=False).assign(effect=scaled @ signs, last=scaled[:, -1])
    table = every_effect[np.asarray(usable)].reset_index(drop=True)
    center = float(table.groupby("network")["last"].mean().mean())
    censored = np.any([cell.censored.loc[pairs].to_numpy() for cell in cells], axis=0)
    return Effects(table.drop(columns="last"), center, len(every) - len(table), int(censored.sum()))


def _cell(values: pd.DataFrame, cell: dict[str, str | float]) -> pd.DataFrame:
    """value and censored of a cell, indexed by network and seed."""
    rows = values[np.logical_and.reduce([(values[column] == value).to_numpy() for column, value in cell.items()])]
    twice = rows[rows.duplicated(KEYS)]
    if len(twice):
        network, seed = twice.iloc[0][KEYS]
        raise InputError(
            f"network {network}, seed {seed}: more than one value of {words(cell)}; a claim needs one for each cell"
        )
    try:
        numbers = rows.value.astype(float)
    except (TypeError, ValueError):
        raise InputError(f"the values of {words(cell)} must be numbers") from None
    censored = rows.censored.astype(bool) if "censored" in rows.columns else pd.Series(False, rows.index)
    return rows[KEYS].assign(value=numbers, censored=censored).set_index(KEYS)


def mean_of(table: pd.DataFrame) -> Mean:
    """The mean of effects [network, seed, effect]: over seeds, or with several networks over networks (see above)."""
    groups = table.groupby("network").effect
    counts, means = groups.size().to_numpy(), groups.mean().to_numpy()
    n, networks = int(counts.min()) if len(counts) else 0, len(counts)
    if networks == 0:
        return Mean(np.nan, np.nan, 0, 0, 0, np.nan, np.nan)
    within = len(table) - networks  # degrees of freedom
    squares = float(((table.effect - groups.transform("mean")) ** 2).sum())
    sd = float(np.sqrt(squares / within)) if within else np.nan
    if networks == 1:
        return Mean(float(means[0]), sd / np.sqrt(n), n - 1, n, 1, sd, 0.0)
    # seeds that do not differ, or one for each network, leave only the networks, which then weigh the same
    known = bool(sd > 0)
    with np.errstate(divide="ignore", invalid="ignore"):  # of heterogeneity measures, which are not used
        combined = combine_effects(
            means, sd**2 / counts if known else np.ones(networks), method_re="iterated", use_t=True
        )
    between = float(combined.tau2) if known else float(means.var(ddof=1))
    error = float(np.sqrt(combined.var_hksj_re))
    return Mean(float(combined.mean_effect_re), error, networks - 1, n, networks, sd, between if within else np.nan)


def zone_of(compare: Comparison, center: float) -> tuple[float, float]:
    """Ends of the zone of practical equivalence as effects."""
    low, high = compare.zone
    return compare.effect(low, center), compare.effect(high, center)


def estimate(compare: Comparison, values: pd.DataFrame) -> Estimate | None:
    """The estimate of a comparison from a table of values; None when it was not measured (see `effects_of`)."""
    effects = effects_of(compare, values)
    return None if effects is None else estimate_of(compare, effects)


def estimate_of(compare: Comparison, effects: Effects) -> Estimate:
    """The estimate of a comparison from its effects."""
    mean = mean_of(effects.table)
    without = bool(effects.censored) or not np.isfinite(mean.error)
    ends = [(-np.inf, np.inf)] * 2 if without else [mean.interval(0.95), mean.interval(0.90)]
    value, (low, high), (low90, high90) = (
        compare.natural(np.asarray(effect, dtype=float), effects.center) for effect in (mean.value, *ends)
    )
    supported, contradicted = (
        (np.nan, np.nan) if without else _p_values(compare, mean, zone_of(compare, effects.center))
    )
    natural = compare.natural(effects.table.effect.to_numpy(), effects.center)
    return Estimate(
        value=float(value),
        low=float(low),
        high=float(high),
        low90=float(low90),
        high90=float(high90),
        p_supported=supported,
        p_contradicted=contradicted,
        n=mean.n,
        networks=mean.networks,
        left_out=effects.left_out,
        by_seed=effects.table.assign(effect=natural),
        censored=effects.censored,
    )


def _p_values(compare: Comparison, mean: Mean, zone: tuple[float, float]) -> tuple[float, float]:
    """One-sided p values of "not as claimed" and "not the contrary"."""
    low, high = zone
    if compare.claimed == WITHIN:
        return max(mean.p_above(low), mean.p_below(high)), min(mean.p_below(low), mean.p_above(high))
    below, above = mean.p_below(low), mean.p_above(high)
    return (above, below) if compare.claimed == ABOVE else (below, above)
