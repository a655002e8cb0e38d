"""Numbers for a reader: as many digits as their interval is worth."""

import math

MOST_DECIMALS = 6


def decimals(error: float) -> int:
    """Decimals that show an error with its first digit, and the second where the first is 1 or 2: 0.018 has 3, 0.4 has 1."""
    power = math.floor(math.log10(error))
    return -power + (error / 10.0**power < 3)


def rounded(error: float, *values: float) -> list[str]:
    """The values with the decimals that their error is worth; three digits each where it is zero, not finite or tiny."""
    places = max(0, decimals(error)) if math.isfinite(error) and error > 0 else MOST_DECIMALS + 1
    kind = ".3g" if places > MOST_DECIMALS or max(map(abs, values)) >= 1e6 else f".{places}f"
    words = [f"{value:{kind}}" for value in values]
    return [word.replace("-", "−") for word in words]


def estimate_words(estimate: float, low: float, high: float) -> str:
    """``0.85 [0.79, 0.92]``; without an interval that is not finite, empty without an estimate."""
    if not math.isfinite(estimate):
        return ""
    if not (math.isfinite(low) and math.isfinite(high)):
        return rounded(math.nan, estimate)[0]
    middle, first, second = rounded((high - low) / 2, estimate, low, high)
    return f"{middle} [{first}, {second}]"
