"""Claims as data, what is estimated for them, and what they are judged to be."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pandas as pd

from secondorder.errors import InputError, check_flag, check_known, check_whole, short
from studies.judge.comparisons import Comparison

SUPPORTED, CONTRADICTED, NO_EFFECT, UNDECIDED = "supported", "contradicted", "no effect", "undecided"
NOT_MEASURED, PROVED = "not measured", "proved"
OUTCOMES = (SUPPORTED, CONTRADICTED, NO_EFFECT, UNDECIDED, NOT_MEASURED, PROVED)

PRIMARY_CLAIMS = 9


@dataclass(frozen=True)
class Estimate:
    """An effect on its natural scale (a ratio, a difference, a value), with its intervals over seeds.

    Without an interval (fewer than two seeds or networks that are independent, or a censored value) the ends are those of the
    natural scale, such as 0 and inf for a ratio, and the p values are nan.
    """

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    low90: float
    """Lower end of the 90 % interval, of two one-sided tests at 5 %."""
    high90: float
    p_supported: float
    """One-sided p value of "not beyond the margin on the claimed side"; for an Equivalence of "not inside the margin"."""
    p_contradicted: float
    """One-sided p value of "not beyond the margin on the other side"; for an Equivalence the smaller one of both sides."""
    n: int
    """Seeds, of the network that has fewest."""
    networks: int
    left_out: int
    """Seeds without an effect, because a value is missing, not finite, or at the end of its scale (zero where logs are taken)."""
    by_seed: pd.DataFrame
    """The points behind the estimate: columns network, seed, effect (on the natural scale)."""
    censored: int = 0
    """Seeds with a value that is only a bound."""

    @property
    def has_interval(self) -> bool:
        """Whether the interval comes from scatter that was seen."""
        return not math.isnan(self.p_supported)


@dataclass(frozen=True)
class Claim:
    """A statement and how records decide it.

    Args:
        name: short and unique, a key for the command line: "smoother loss".
        statement: one sentence, the claim of the paper.
        study: the study whose records it is judged on; "": no study measures it yet.
        quantity: what is compared, in words with its formula.
        compare: the comparison, with the claimed side and the margin.
        values: takes the records of the study on one data set to columns network, seed, those that `compare` names, and value; a
            column censored, where there is one, is True for values that are only bounds.
        primary: 1 to 9, the number of the primary claim; 0: exploratory, which has an estimate and no verdict.
        says: outcome -> sentence for a reader; what is missing has a plain one.
        proved: whether it is a theorem, which the records check numerically.
    """

    name: str
    statement: str
    study: str
    quantity: str
    compare: Comparison
    values: Callable[[pd.DataFrame], pd.DataFrame]
    primary: int = 0
    says: Mapping[str, str] = field(default_factory=dict)
    proved: bool = False

    def __post_init__(self) -> None:
        for name in ("name", "statement", "quantity"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name} of a claim {short(text)}: must be words")
        if not isinstance(self.study, str):
            raise InputError(
                f"claim {self.name!r}: study {short(self.study)} must be a name, or '' where there is none yet"
            )
        if not isinstance(self.compare, Comparison):
            raise InputError(
                f"claim {self.name!r}: compare {short(self.compare)} must be a comparison such as Ratio(of, to)"
            )
        if not callable(self.values):
            raise InputError(f"claim {self.name!r}: values {short(self.values)} must be a function of the records")
        check_whole(f"primary of claim {self.name!r}", self.primary, least=0, most=PRIMARY_CLAIMS)
        check_flag(f"proved of claim {self.name!r}", self.proved)
        for outcome in self.says:
            check_known(f"outcome in says of claim {self.name!r}", outcome, OUTCOMES)


@dataclass(frozen=True)
class Judged:
    """A claim on one data set ("" where nothing was measured on any)."""

    claim: Claim
    dataset: str
    estimate: Estimate | None
    """None: not measured."""
    outcome: str
    """One of OUTCOMES; "" for a measured exploratory claim."""
    p_holm: float
    """Holm-adjusted one-sided p value of the side that the estimate lies on, for primary claims with an interval; else nan."""
    seeds_needed: int | None
    """Seeds, of each network, with which an undecided claim would be decided; None: no number up to 1,000, or not undecided."""
    sentence: str
