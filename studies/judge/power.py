"""How many seeds would decide a claim, if the effect and the scatter are as seen.

With n seeds in each of k networks the mean effect has the standard error e(n) = sqrt((tau^2 + sd^2 / n) / k), and k - 1 degrees
of freedom (n - 1 with one network, where tau = 0). For a zone [a, b] and a true effect mu

    beyond it:  P(T < -t_level), T noncentral t with parameter (mu - a) / e, or P(T > t_level) with (mu - b) / e;
    inside it:  P(T_a > t) + P(T_b < -t) - 1, t = t_0.05, the power of two one-sided tests up to the chance that both fail.
"""

import bisect
import math
import sys

import numpy as np
from scipy import stats

LEVEL = 0.025
"""Of a one-sided test of "beyond the margin": that of a two-sided 95 % interval."""
INSIDE_LEVEL = 0.05
"""Of each of the two one-sided tests of "inside the margin": that of a 90 % interval."""
POWER = 0.8
MOST_SEEDS = 1000
FARTHEST = 1e6
"""Noncentrality beyond which the distribution has no numbers; the power is 0 or 1 long before."""


def seeds_needed(
    effect: float,
    sd: float,
    zone: tuple[float, float],
    *,
    networks: int = 1,
    between: float = 0.0,
    level: float = LEVEL,
    inside_level: float = INSIDE_LEVEL,
) -> int | None:
    """The smallest number of seeds in each network with a power of 80 % of being beyond the zone or of being inside it.

    Args:
        effect: the true effect, for which the mean that was seen is taken.
        sd: standard deviation between seeds within a network.
        zone: ends of the zone of practical equivalence, as effects.
        networks: how many networks there are; their number stays.
        between: variance tau^2 of effects between networks.
        level: of the one-sided test of "beyond"; divided by the number of claims for a correction.
        inside_level: of the two tests of "inside".

    Returns None where no number up to 1,000 is enough: an effect on the edge of the zone, no margin, or too few networks.
    """
    if not np.isfinite([effect, sd, between]).all():
        return None

    def enough(seeds: int) -> bool:
        error = max(math.sqrt((between + sd**2 / seeds) / networks), sys.float_info.min)
        freedom = networks - 1 if networks > 1 else seeds - 1
        low, high = ((effect - end) / error for end in zone)
        outside = max(_power(-low, freedom, level), _power(high, freedom, level))
        inside = _power(low, freedom, inside_level) + _power(-high, freedom, inside_level) - 1
        return max(outside, inside) >= POWER

    numbers = range(1 if networks > 1 else 2, MOST_SEEDS + 1)
    first = bisect.bisect_left(numbers, True, key=enough)  # both powers grow with the number of seeds
    return numbers[first] if first < len(numbers) else None


def _power(noncentrality: float, freedom: int, level: float) -> float:
    """P(T > t_level) of the noncentral t distribution."""
    bounded = min(max(noncentrality, -FARTHEST), FARTHEST)
    return float(stats.nct.sf(stats.t.isf(level, freedom), freedom, bounded))
