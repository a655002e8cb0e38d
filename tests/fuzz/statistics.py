"""Intervals of any numbers."""

import math
from random import Random
from typing import Any

import numpy as np
from scipy import stats

from studies.statistics import Interval, geometric_interval, mean_interval, median_interval, ratio_interval

from .call import Call, shown
from .values import absurd

FUNCTIONS = {"mean": mean_interval, "median": median_interval, "geometric": geometric_interval}


def values_of(random: Random) -> Any:
    """A list of numbers, some of them odd, or something else."""
    n = random.choice((0, 1, 2, 3, 6, 20))
    scale = random.choice((1.0, 1.0, 1e-300, 1e150, 1e300, 5e-324))
    plain = [random.gauss(1, 1) * scale for _ in range(n)]
    kind = random.choice(("plain", "plain", "positive", "equal", "odd", "integers", "nested", "thing", "huge"))
    return {
        "plain": plain,
        "positive": [abs(v) for v in plain],
        "equal": [2.5 * scale] * n,
        "odd": [*plain, random.choice((math.nan, math.inf, -math.inf, 0.0, None))],
        "integers": [random.randint(-3, 3) for _ in range(n)],
        "nested": [plain, plain],
        "thing": absurd(random),
        "huge": [1e308, -1e308, 1e308],
    }[kind]


def statistics(random: Random) -> Call:
    """Any of the kinds below."""
    return random.choice((interval, interval, ratio))(random)


def ordered(found: Interval) -> str | None:
    """low <= estimate <= high wherever they are numbers."""
    numbers = (found.low, found.estimate, found.high)
    if any(math.isnan(v) for v in numbers):
        return None
    slack = 1e-9 * abs(found.estimate) if math.isfinite(found.estimate) else 0.0
    if not found.low - slack <= found.estimate <= found.high + slack:
        return f"not in order: {found}"
    return None if isinstance(found.short, str) else "no words"


def interval(random: Random) -> Call:
    """An interval of one list, against SciPy where that is plain."""
    name, values = random.choice(list(FUNCTIONS)), values_of(random)

    def check(found: Interval) -> str | None:
        if wrong := ordered(found):
            return wrong
        x = np.asarray(values, dtype=float).ravel()
        if name != "mean" or x.size < 2 or not np.isfinite(x).all() or not 1e-100 < abs(x).max() < 1e100:
            return None
        if not x.std(ddof=1) > 1e-9 * abs(x).max():  # of equal values SciPy has NaN
            return None
        low, high = stats.t.interval(0.95, x.size - 1, x.mean(), stats.sem(x))
        fits = np.allclose([found.low, found.high], [low, high], rtol=1e-9)
        return None if fits else f"SciPy has [{low}, {high}], not {found}"

    return Call(
        f"{name}_interval({shown(values)})",
        lambda: FUNCTIONS[name](values),
        check=check,
        pure=True,
    )


def ratio(random: Random) -> Call:
    """Paired ratios; scale does not matter."""
    a, b = values_of(random), values_of(random)
    if random.random() < 0.5 and isinstance(a, list):
        b = [random.uniform(0.5, 2.0) for _ in a]
    return Call(f"ratio_interval({shown(a)}, {shown(b)})", lambda: ratio_interval(a, b), check=ordered, pure=True)
