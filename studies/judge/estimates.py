"""From a table of values to the effect of a comparison with its t interval over seeds, or over networks.

An effect is computed within each network and seed (`comparisons`), on the comparison's scale. With one network the estimate is
the mean over seeds with Student's interval, mean +- t_{n-1} s / sqrt(n). With k >= 2 networks, n_i seeds and mean effect y_i in
network i, it is a random-effects mean over networks,

    y_i ~ N(mu, tau^2 + s^2 / n_i),    w_i = 1 / (tau^2 + s^2 / n_i),    mean = sum w_i y_i / sum w_i,

with tau^2 by Paule and Mandel and the modified interval of Knapp and Hartung, mean +- t_{k-1} e where

    e^2 = max(1, q) / sum w_i,    q = sum w_i (y_i - mean)^2 / (k - 1).

Why not q alone: tau^2 makes it 1, unless networks agree better than the scatter of their seeds allows; then tau^2 = 0, q < 1. The
interval with q, the t interval of the means where all networks have as many seeds, covers 95 % in all. But where q < 1 it covers
less: of 3 networks with 4 seeds 92 % for tau = 0, 87 % for tau = s / 2, 54 % for tau = 2 s (simulated), and means that agree by
chance would decide a claim. For few studies the modification is recommended (Roever, Knapp and Friede, BMC Med. Res. Methodol.
2015). Its price are intervals that cover more than 95 % where tau is small, and hence fewer decisions.

Assumed are networks drawn from those that the claim is about; effects normal on the scale, independent between networks and
seeds; and one variance s^2 between seeds in every network, pooled because that of a few seeds is a poor weight. Two networks have
an interval of one degree of freedom, 12.7 standard errors to each side: few networks say little about others.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.meta_analysis import combine_effects

from secondorder.errors import InputError
from studies.judge.cells import Cell, check_columns, words
from studies.judge.comparisons import Comparison
from studies.judge.scales import SCALES, check_range

KEYS = ["network", "seed"]


@dataclass(frozen=True)
class Mean:
    """A mean effect on its scale, with standard error and degrees of freedom; nan where they cannot be known."""

    value: float = np.nan
    error: float = np.nan
    freedom: int = 0
    sd: float = np.nan
    """Standard deviation between seeds within a network, pooled."""
    between: float = np.nan
    """tau^2, the variance between networks; 0 with one network."""

    def interval(self, confidence: float) -> tuple[float, float]:
        """mean +- t error; infinite ends where there is no error."""
        if not np.isfinite(self.error):
            return -np.inf, np.inf
        half = float(stats.t.ppf(0.5 + confidence / 2, self.freedom)) * self.error
        return self.value - half, self.value + half

    def p_value(self, distance: float) -> float:
        """One-sided p value of a mean that is `distance` beyond the end of a zone; nan where there is no error."""
        if self.error == 0:  # seeds that agree exactly leave no doubt
            return 0.0 if distance > 0 else 1.0
        return float(stats.t.sf(distance / self.error, self.freedom))


@dataclass(frozen=True)
class Estimate:
    """An effect on its natural scale (a ratio, a difference, a value), with its intervals over seeds.

    Without an interval (fewer than two seeds or networks that are independent, or a censored value) the ends are those of the
    natural scale, such as 0 and inf for a ratio.
    """

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    n: int
    """Seeds, of the network that has fewest."""
    networks: int
    left_out: int
    """Seeds without an effect, because a value is missing, not finite, or at the end of its scale (zero where logs are taken)."""
    by_seed: pd.DataFrame
    """The points behind the estimate: columns network, seed, effect (on the natural scale)."""
    censored: int
    """Seeds with a value that is only a bound."""
    mean: Mean
    """The mean effect on the scale of the comparison."""
    zone: tuple[float, float]
    """Ends of the zone of practical equivalence, on that scale."""

    @property
    def has_interval(self) -> bool:
        """Whether the interval comes from scatter that was seen."""
        return bool(np.isfinite(self.mean.error))

    @property
    def seen(self) -> tuple[float, float, float]:
        """Value and both ends of the interval, nan where no scatter was seen."""
        return (self.value, self.low, self.high) if self.has_interval else (self.value, np.nan, np.nan)


def estimate(compare: Comparison, values: pd.DataFrame) -> Estimate | None:
    """The estimate of a comparison from a table of values (columns network, seed, its own, value, perhaps censored).

    None when no seed of any network has rows in all cells. Raises InputError for a table that lacks columns, holds no numbers, or
    has two values of one cell.
    """
    if isinstance(values, pd.DataFrame) and values.empty:
        return None
    check_columns("the values of a claim", values, [*KEYS, *compare.columns, "value"])
    cells = [_cell(values, cell) for _, cell in compare.contrast]
    numbers = pd.concat([cell.value for cell in cells], axis=1, join="inner")
    censored = int(pd.concat([cell.censored for cell in cells], axis=1, join="inner").any(axis=1).sum())
    if numbers.empty:
        return None
    effects = _effects(compare, numbers)
    center = float(effects.groupby("network")["last"].mean().mean())
    mean = mean_of(effects)
    if censored:  # bounds have no scatter
        mean = replace(mean, error=np.nan, sd=np.nan)
    seeds = effects.groupby("network").size()
    value, low, high = compare.natural(np.array([mean.value, *mean.interval(0.95)]), center).tolist()
    return Estimate(
        value=value,
        low=low,
        high=high,
        n=int(seeds.min()) if len(seeds) else 0,
        networks=len(seeds),
        left_out=len(set().union(*(cell.index for cell in cells))) - len(effects),
        by_seed=effects[KEYS].assign(effect=compare.natural(effects.effect.to_numpy(), center)),
        censored=censored,
        mean=mean,
        zone=(compare.effect(compare.zone[0], center), compare.effect(compare.zone[1], center)),
    )


def _cell(values: pd.DataFrame, cell: Cell) -> pd.DataFrame:
    """value and censored of a cell, indexed by network and seed."""
    rows = values[np.logical_and.reduce([values[column] == value for column, value in cell.items()])]
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
    censored = rows.censored.astype(bool) if "censored" in rows.columns else False
    return rows[KEYS].assign(value=numbers, censored=censored).set_index(KEYS)


def _effects(compare: Comparison, numbers: pd.DataFrame) -> pd.DataFrame:
    """network, seed, effect and last, g of the last cell, where all are finite; `numbers` are the cells by network and seed."""
    x = np.ascontiguousarray(numbers.to_numpy())  # [seeds, cells]
    check_range(compare.scale, x)
    scaled = SCALES[compare.scale].transformed(x)
    scaled[~np.isfinite(x) | ~np.isfinite(scaled)] = np.nan
    signs = np.array([sign for sign, _ in compare.contrast], dtype=float)
    table = numbers.index.to_frame(index=False).assign(effect=scaled @ signs, last=scaled[:, -1])
    return table.dropna(subset=["effect"]).reset_index(drop=True)


def mean_of(effects: pd.DataFrame) -> Mean:
    """The mean of effects [network, seed, effect]: over seeds, or with several networks over networks (see above)."""
    groups = effects.groupby("network").effect
    counts, means = groups.size().to_numpy(), groups.mean().to_numpy()
    networks = len(counts)
    if networks == 0:
        return Mean()
    within = len(effects) - networks  # degrees of freedom
    squares = float(((effects.effect - groups.transform("mean")) ** 2).sum())
    sd = float(np.sqrt(squares / within)) if within else np.nan
    if networks == 1:
        return Mean(float(means[0]), sd / np.sqrt(len(effects)), within, sd, 0.0)
    # seeds that do not differ, or one for each network, leave only the networks, which then weigh the same
    known = bool(sd > 0)
    variances = sd**2 / counts if known else np.ones(networks)
    with np.errstate(divide="ignore", invalid="ignore"):  # of heterogeneity measures, which are not used
        combined = combine_effects(means, variances, method_re="iterated", use_t=True)
    between = float(combined.tau2) if known else float(means.var(ddof=1))
    least = combined.var_eff_w_re if known and between == 0 else 0.0  # with tau^2 above 0, q is 1
    error = float(np.sqrt(max(combined.var_hksj_re, least)))
    return Mean(float(combined.mean_effect_re), error, networks - 1, sd, between if within else np.nan)
