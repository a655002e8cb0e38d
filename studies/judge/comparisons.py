"""What a claim compares: cells of a table of values, joined within each network and seed to one effect.

The effect of a seed is a contrast of the values x of its cells on a scale g (`scales.SCALES`):

    Ratio        log x_of - log x_to
    Difference   g(x_of) - g(x_to)
    Interaction  [g(x_of,numerator) - g(x_of,denominator)] - [g(x_to,numerator) - g(x_to,denominator)]
    Bound        g(x_of)
    Equivalence  that of the comparison in it

Means and t intervals are those of effects. They are told on a natural scale (a ratio, a difference of values, a value), on which
lies the zone of practical equivalence, reference - margin to reference + margin. Arguments of all kinds:

    of, to    cells, such as {"head": "gcp"}, in the same columns
    claimed   the side of the zone on which the effect is claimed to be, "below" or "above"
    margin    what counts as no effect, on the natural scale: 0.1 of a Ratio is 0.9 to 1.1
    scale     g: "identity"; "log" for positive values; "logit" for fractions such as accuracy; "fisher" for correlations
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np

from secondorder.errors import InputError, check_known, check_number, short
from studies.judge.cells import Cell, check_cells
from studies.judge.scales import SCALES, Array

BELOW, ABOVE, WITHIN = "below", "above", "within"


@dataclass(frozen=True)
class Comparison:
    """A contrast of cells, claimed to lie on one side of its zone of practical equivalence, or within it.

    Args:
        contrast: the cells, each with its sign in the effect.
        claimed: the side, "below" or "above", or "within".
        margin: half the width of the zone.
        scale: g of the values.
        told: how effects are told: as a "value" g^-1(effect); as a "difference" g^-1(c + effect) - g^-1(c) for c the mean of g
            over the last cell; or as the "effect" that they are.
        reference: the middle of the zone.
    """

    contrast: Sequence[tuple[int, Cell]]
    claimed: str
    margin: float
    scale: str
    told: str
    reference: float = 0.0

    @property
    def columns(self) -> list[str]:
        """The columns that the cells name."""
        return list(dict.fromkeys(column for _, cell in self.contrast for column in cell))

    @property
    def zone(self) -> tuple[float, float]:
        """Both ends of the zone of practical equivalence, on the natural scale."""
        return self.reference - self.margin, self.reference + self.margin

    def natural(self, effects: Array, center: float) -> Array:
        """Effects on the natural scale; `center` is the mean of g over the last cell."""
        g = SCALES[self.scale]
        if self.told == "difference":
            return g.natural(center + effects) - g.natural(center)
        return g.natural(effects) if self.told == "value" else effects

    def effect(self, natural: float, center: float) -> float:
        """The effect of a natural value, the inverse of `natural`; infinite where the value is out of reach."""
        g = SCALES[self.scale]
        if self.told == "difference":
            return float(g.transformed(g.natural(center) + natural)) - center
        return float(g.transformed(natural)) if self.told == "value" else natural


def Ratio(of: Cell, to: Cell, claimed: str = BELOW, margin: float = 0.1) -> Comparison:
    """x_of / x_to, paired by network and seed: the geometric mean, with the t interval of logarithms, against 1."""
    check_cells(of=of, to=to)
    _check_zone(claimed, margin, most=1.0)
    return Comparison([(1, of), (-1, to)], claimed, margin, "log", "value", reference=1.0)


def Difference(of: Cell, to: Cell, claimed: str = ABOVE, margin: float = 0.0, scale: str = "identity") -> Comparison:
    """x_of - x_to, paired by network and seed, against 0; on a scale with bounds, the interval stays where differences can be.

    The t interval is that of g(x_of) - g(x_to), told as g^-1(c + effect) - g^-1(c) for c the mean of g(x_to) over the pairs,
    which counts as known. Hence for every scale the margin is in units of the values (0.005: half a point of accuracy). A
    fraction of 0 or 1 and a correlation of -1 or 1 have no finite g and are left out, counted.
    """
    check_cells(of=of, to=to)
    _check_zone(claimed, margin)
    check_known("scale of a difference", scale, [name for name in SCALES if name != "log"])
    told = "effect" if scale == "identity" else "difference"  # adding c and subtracting it again would only round
    return Comparison([(1, of), (-1, to)], claimed, margin, scale, told)


def Interaction(
    of: Cell,
    to: Cell,
    numerator: Cell,
    denominator: Cell,
    claimed: str = BELOW,
    margin: float = 0.1,
    scale: str = "log",
) -> Comparison:
    """The gain, numerator / denominator, of one group against that of another: a difference of differences of logarithms.

    With numerator {"optimizer": "sgd"} and denominator {"optimizer": "kfac"}, in steps to a target, it is the logarithm of
    K-FAC's speed-up under head `of` less that under head `to`: below 0 where K-FAC helps `of` less. The margin is in logarithms
    (0.1: some 10 %). On the scale "identity" it is one of plain differences, with the margin in units of the values.
    """
    check_cells(of=of, to=to)
    check_cells(numerator=numerator, denominator=denominator)
    if shared := sorted({*of} & {*numerator}):
        raise InputError(
            f"an interaction crosses two factors, and {shared[0]!r} is a column of both: give each its own"
        )
    _check_zone(claimed, margin)
    check_known("scale of an interaction", scale, ("log", "identity"))
    signs = [(1, of, numerator), (-1, of, denominator), (-1, to, numerator), (1, to, denominator)]
    return Comparison([(sign, {**group, **side}) for sign, group, side in signs], claimed, margin, scale, "effect")


def Bound(of: Cell, claimed: str, reference: float, margin: float = 0.0, scale: str = "identity") -> Comparison:
    """The values of one cell against a constant in their units: on "log" their geometric mean, else g^-1 of the mean of g."""
    check_cells(of=of)
    _check_zone(claimed, margin)
    check_known("scale of a bound", scale, SCALES)
    low, high = SCALES[scale].low, SCALES[scale].high
    number = isinstance(reference, Real) and not isinstance(reference, bool)
    if not number or not np.isfinite(reference) or not low <= reference <= high:
        raise InputError(f"reference {short(reference)}: {scale!r} needs a finite number from {low:g} to {high:g}")
    return Comparison([(1, of)], claimed, margin, scale, "value", reference)


def Equivalence(comparison: Comparison) -> Comparison:
    """The claim that the effect of a comparison lies within its zone; the side that the comparison itself claims is not used.

    Supported where the whole 90 % interval (two one-sided tests at 5 %) is inside the zone; contradicted where the whole 95 %
    interval is beyond it, on either side.
    """
    if not isinstance(comparison, Comparison) or comparison.claimed == WITHIN:
        raise InputError(f"comparison {short(comparison)}: must be a Ratio, Difference, Interaction or Bound")
    if not comparison.margin > 0:
        raise InputError(
            f"margin {comparison.margin:g} of an equivalence: must be above 0, nothing lies inside no width"
        )
    return replace(comparison, claimed=WITHIN)


def _check_zone(claimed: object, margin: object, most: float = np.inf) -> None:
    check_known("side claimed", claimed, (BELOW, ABOVE))
    check_number("margin", margin, 0, most)
