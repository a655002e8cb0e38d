"""What a claim compares: cells of a table of values, joined within each network and seed to one effect.

The effect of a seed is a contrast of the values x of its cells on a scale g (`scales.SCALES`):

    Ratio        log x_of - log x_to
    Difference   g(x_of) - g(x_to)
    Interaction  [g(x_of,numerator) - g(x_of,denominator)] - [g(x_to,numerator) - g(x_to,denominator)]
    Bound        g(x_of)
    Equivalence  that of the comparison in it

Means and t intervals are those of effects. They are told on a natural scale (a ratio, a difference of values, a value), on which
lies the zone of practical equivalence, reference - margin to reference + margin.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

import numpy as np

from secondorder.errors import InputError, check_known, short
from studies.judge.cells import ABOVE, BELOW, WITHIN, Cell, check_cell, check_claimed, check_margin, check_pair
from studies.judge.scales import SCALES, Array


class Comparison(ABC):
    """A contrast of cells, claimed to lie on one side of its zone of practical equivalence (or within it)."""

    claimed: str
    margin: float
    reference: float
    scale: str

    @property
    @abstractmethod
    def contrast(self) -> list[tuple[int, Cell]]:
        """The cells, each with its sign in the effect."""

    @property
    def columns(self) -> list[str]:
        """The columns that the cells name."""
        return list(dict.fromkeys(column for _, cell in self.contrast for column in cell))

    @property
    def zone(self) -> tuple[float, float]:
        """Both ends of the zone of practical equivalence, on the natural scale."""
        return self.reference - self.margin, self.reference + self.margin

    def natural(self, effects: Array, center: float) -> Array:
        """Effects on the natural scale, g^-1(effect) if not said otherwise; `center` is the mean of g over the last cell."""
        return SCALES[self.scale].natural(effects)

    def effect(self, natural: float, center: float) -> float:
        """The effect of a natural value, the inverse of `natural`; infinite where the value is out of reach."""
        return float(SCALES[self.scale].transformed(natural))


@dataclass(frozen=True)
class Ratio(Comparison):
    """x_of / x_to, paired by network and seed: the geometric mean, with the t interval of logarithms.

    Args:
        of: cell of the numerator.
        to: cell of the denominator.
        claimed: whether the ratio is claimed to be "below" or "above" 1.
        margin: ratios from 1 - margin to 1 + margin count as no effect.
    """

    of: Cell
    to: Cell
    claimed: str = BELOW
    margin: float = 0.1
    reference = 1.0
    scale = "log"

    def __post_init__(self) -> None:
        check_pair("of", self.of, "to", self.to)
        check_claimed(self.claimed)
        check_margin(self.margin, most=1.0)

    @property
    def contrast(self) -> list[tuple[int, Cell]]:
        """log x_of - log x_to."""
        return [(1, self.of), (-1, self.to)]


@dataclass(frozen=True)
class Difference(Comparison):
    """x_of - x_to, paired by network and seed; on a scale g with bounds, the interval stays where differences can be.

    The t interval is that of g(x_of) - g(x_to), told as g^-1(c + effect) - g^-1(c) for c the mean of g(x_to) over the pairs,
    which counts as known. Hence for every scale the margin is in units of the values (0.005: half a point of accuracy). A
    fraction of 0 or 1 and a correlation of -1 or 1 have no finite g and are left out, counted.

    Args:
        of: cell of the minuend.
        to: cell of the subtrahend.
        claimed: whether the difference is claimed to be "below" or "above" 0.
        margin: differences from -margin to margin count as no effect, in units of the values.
        scale: "identity"; "logit" for fractions such as accuracy; "fisher" for correlations.
    """

    of: Cell
    to: Cell
    claimed: str = ABOVE
    margin: float = 0.0
    scale: str = "identity"
    reference = 0.0

    def __post_init__(self) -> None:
        check_pair("of", self.of, "to", self.to)
        check_claimed(self.claimed)
        check_margin(self.margin)
        check_known("scale of a difference", self.scale, [name for name in SCALES if name != "log"])

    @property
    def contrast(self) -> list[tuple[int, Cell]]:
        """g(x_of) - g(x_to)."""
        return [(1, self.of), (-1, self.to)]

    def natural(self, effects: Array, center: float) -> Array:
        """g^-1(c + effect) - g^-1(c); the effect itself on the identity, where subtracting c again would only round."""
        g = SCALES[self.scale]
        return effects if self.scale == "identity" else g.natural(center + effects) - g.natural(center)

    def effect(self, natural: float, center: float) -> float:
        """g(g^-1(c) + difference) - c."""
        g = SCALES[self.scale]
        return natural if self.scale == "identity" else float(g.transformed(g.natural(center) + natural)) - center


@dataclass(frozen=True)
class Interaction(Comparison):
    """The gain, numerator / denominator, of one group against that of another: a difference of differences of logarithms.

    With numerator {"optimizer": "sgd"} and denominator {"optimizer": "kfac"}, in steps to a target, it is the logarithm of
    K-FAC's speed-up under head `of` less that under head `to`: below 0 where K-FAC helps `of` less.

    Args:
        of: cell of the group whose gain is looked at.
        to: cell of the group that it is compared with, in the same columns.
        numerator: cell in other columns, on top of the gain.
        denominator: cell in the same columns as `numerator`, below it.
        claimed: whether the interaction is claimed to be "below" or "above" 0.
        margin: interactions from -margin to margin count as no effect, in logarithms (0.1: some 10 %).
        scale: g of the values: "log", or "identity" for plain differences, with the margin in units of the values.
    """

    of: Cell
    to: Cell
    numerator: Cell
    denominator: Cell
    claimed: str = BELOW
    margin: float = 0.1
    scale: str = "log"
    reference = 0.0

    def __post_init__(self) -> None:
        check_pair("of", self.of, "to", self.to)
        check_pair("numerator", self.numerator, "denominator", self.denominator)
        if shared := sorted({*self.of} & {*self.numerator}):
            raise InputError(
                f"an interaction crosses two factors, and {shared[0]!r} is a column of both: give each its own"
            )
        check_claimed(self.claimed)
        check_margin(self.margin)
        check_known("scale of an interaction", self.scale, ("log", "identity"))

    @property
    def contrast(self) -> list[tuple[int, Cell]]:
        """The four cells."""
        signs = [(1, self.of, self.numerator), (-1, self.of, self.denominator)]
        signs += [(-1, self.to, self.numerator), (1, self.to, self.denominator)]
        return [(sign, {**group, **side}) for sign, group, side in signs]

    def natural(self, effects: Array, center: float) -> Array:
        """The effects as they are: an interaction of logarithms is told in logarithms."""
        return effects

    def effect(self, natural: float, center: float) -> float:
        """The value as it is."""
        return natural


@dataclass(frozen=True)
class Bound(Comparison):
    """The values of one cell against a constant: on "log" their geometric mean, else g^-1 of the mean of g.

    Args:
        of: the cell.
        claimed: whether the value is claimed to be "below" or "above" the reference.
        reference: the constant, in units of the values.
        margin: values from reference - margin to reference + margin count as no effect, in units of the values.
        scale: g of the values: "identity"; "log" for positive values; "logit" for fractions; "fisher" for correlations.
    """

    of: Cell
    claimed: str
    reference: float
    margin: float = 0.0
    scale: str = "identity"

    def __post_init__(self) -> None:
        check_cell("of", self.of)
        check_claimed(self.claimed)
        check_margin(self.margin)
        check_known("scale of a bound", self.scale, SCALES)
        low, high = SCALES[self.scale].low, SCALES[self.scale].high
        number = isinstance(self.reference, Real) and not isinstance(self.reference, bool)
        if not number or not np.isfinite(self.reference) or not low <= self.reference <= high:
            raise InputError(
                f"reference {short(self.reference)}: {self.scale!r} needs a finite number from {low:g} to {high:g}"
            )

    @property
    def contrast(self) -> list[tuple[int, Cell]]:
        """g(x_of)."""
        return [(1, self.of)]


@dataclass(frozen=True)
class Equivalence(Comparison):
    """The claim that the effect of a comparison lies within its zone; the side that the comparison itself claims is not used.

    Supported where the whole 90 % interval (two one-sided tests at 5 %) is inside the zone; contradicted where the whole 95 %
    interval is beyond it, on either side.
    """

    comparison: Comparison

    claimed = WITHIN

    def __post_init__(self) -> None:
        if not isinstance(self.comparison, Ratio | Difference | Interaction | Bound):
            raise InputError(f"comparison {short(self.comparison)}: must be a Ratio, Difference, Interaction or Bound")
        if not self.comparison.margin > 0:
            raise InputError(
                f"margin {self.comparison.margin:g} of an equivalence: must be above 0, nothing lies inside no width"
            )
        for name in ("margin", "reference", "scale"):
            object.__setattr__(self, name, getattr(self.comparison, name))

    @property
    def contrast(self) -> list[tuple[int, Cell]]:
        """The contrast of the comparison."""
        return self.comparison.contrast

    def natural(self, effects: Array, center: float) -> Array:
        """The natural scale of the comparison."""
        return self.comparison.natural(effects, center)

    def effect(self, natural: float, center: float) -> float:
        """The effect of the comparison."""
        return self.comparison.effect(natural, center)
