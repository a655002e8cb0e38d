"""Numbers for a reader: as many digits as their interval is worth."""

import math

MOST_DECIMALS = 6
WIDE = 10.0
"""Ratio of the ends from which an interval is wide on a logarithmic scale."""


def rounded(error: float, *values: float) -> list[str]:
    """The values with the decimals that their error is worth: its first digit, and the second below 0.355, 0.0355 and so on.

    That is the rule of the Particle Data Group. Three digits each where the error is zero, not finite or tiny.
    """
    places = MOST_DECIMALS + 1
    if math.isfinite(error) and error > 0:
        power = math.floor(math.log10(error))
        places = max(0, -power + (error / 10.0**power < 3.55))  # 0.018 has 3, 0.4 has 1
    kind = ".3g" if places > MOST_DECIMALS or max(map(abs, values)) >= 1e6 else f".{places}f"
    return [f"{value:{kind}}".replace("-", "−") for value in values]


def estimate_words(estimate: float, low: float, high: float) -> str:
    """``0.85 [0.79, 0.92]``; without an interval that is not finite, empty without an estimate.

    Each number has two digits of its own, ``2.6 [0.19, 37]``, where the interval is wide on a logarithmic scale and the estimate
    is nearer to its middle there: with the decimals of the upper end the lower one would read 0.
    """
    if not math.isfinite(estimate):
        return ""
    if not (math.isfinite(low) and math.isfinite(high)):
        return rounded(math.nan, estimate)[0]
    if low > 0 and high > WIDE * low and abs(estimate - math.sqrt(low * high)) < abs(estimate - (low + high) / 2):
        middle, first, second = (f"{float(f'{value:.2g}'):g}" for value in (estimate, low, high))
    else:
        middle, first, second = rounded((high - low) / 2, estimate, low, high)
    return f"{middle} [{first}, {second}]"
