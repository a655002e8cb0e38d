"""Analysis of covariance: what a quantity would be, had all networks the same value of another one."""

import numpy as np
import pandas as pd

KEYS = ["network", "dataset", "head", "seed"]


def at_matched(table: pd.DataFrame) -> pd.DataFrame:
    """y that each network would have at the mean x of its architecture (KEYS, y).

    y = a_head + b x, with one slope for all heads of an architecture. Values are jackknife pseudo-values, n m - (n - 1) m_s for m
    the adjusted mean of a head and m_s that without seed s, slope and all: the scatter of adjusted values would count the slope
    as known, and where x differs between heads most of what is not known is the slope.

    Args:
        table: columns KEYS, x and y, both on scales on which they are linear, such as logits of fractions.
    """
    parts = []
    for _, both in table.groupby("network", sort=False):
        whole, seeds = _adjusted(both, both.x.mean()), both.groupby("head").seed.transform("nunique")
        without = {seed: _adjusted(both[both.seed != seed], both.x.mean()) for seed in both.seed.unique()}
        left = pd.Series([without[s].get(h, np.nan) for s, h in zip(both.seed, both["head"], strict=True)], both.index)
        mean_of_head = both["head"].map(whole)
        parts.append(both[KEYS].assign(y=mean_of_head - (seeds - 1) * (left.fillna(mean_of_head) - mean_of_head)))
    return pd.concat(parts) if parts else pd.DataFrame(columns=[*KEYS, "y"])


def _adjusted(both: pd.DataFrame, at: float) -> pd.Series:
    """The mean of y of every head, brought to x = at along the common slope within heads; 0 where nothing varies."""
    means = both.groupby("head")[["x", "y"]].mean()
    x, y = (both[name] - both["head"].map(means[name]) for name in ("x", "y"))
    scatter = float((x**2).sum())
    slope = float((x * y).sum()) / scatter if scatter > 0 else 0.0
    return means.y - slope * (means.x - at)
