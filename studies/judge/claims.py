"""Claims as data, and what they are judged to be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from secondorder.errors import InputError, check_flag, check_known, check_whole, short
from studies.judge.comparisons import Comparison
from studies.judge.estimates import Estimate

SUPPORTED, CONTRADICTED, NO_EFFECT, UNDECIDED = "supported", "contradicted", "no effect", "undecided"
NOT_MEASURED, PROVED = "not measured", "proved"
OUTCOMES = (SUPPORTED, CONTRADICTED, NO_EFFECT, UNDECIDED, NOT_MEASURED, PROVED)
PRIMARY_CLAIMS = 9

Values = Callable[[pd.DataFrame], pd.DataFrame]


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
            column censored, where there is one, is True for values that are only bounds. None: no study measures it.
        primary: 1 to 9, the number of the primary claim; 0: exploratory, which has an estimate and no verdict.
        says: outcome -> sentence for a reader; what is missing has a plain one.
        proved: whether it is a theorem, which the records check numerically.
    """

    name: str
    statement: str
    study: str
    quantity: str
    compare: Comparison
    values: Values | None = None
    primary: int = 0
    says: Mapping[str, str] = field(default_factory=dict)
    proved: bool = False

    def __post_init__(self) -> None:
        for name in ("name", "statement", "quantity"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{name} of a claim {short(text)}: must be words")
        for name, right, what in (
            ("study", isinstance(self.study, str), "a name, or '' where there is none yet"),
            ("compare", isinstance(self.compare, Comparison), "a comparison such as Ratio(of, to)"),
            ("values", callable(self.values) or (self.primary and self.values is None), "a function of the records"),
        ):
            if not right:
                raise InputError(f"claim {self.name!r}: {name} {short(getattr(self, name))} must be {what}")
        check_whole(f"primary of claim {self.name!r}", self.primary, least=0, most=PRIMARY_CLAIMS)
        check_flag(f"proved of claim {self.name!r}", self.proved)
        for outcome in self.says:
            check_known(f"outcome in says of claim {self.name!r}", outcome, OUTCOMES)

    def measured(self, values: Values, says: Mapping[str, str] | None = None) -> "Claim":
        """The claim as a study measures it."""
        return replace(self, values=values, says=says or {})


@dataclass(frozen=True)
class Judged:
    """A claim on one data set ("" where nothing was measured on any)."""

    claim: Claim
    dataset: str
    estimate: Estimate | None
    """None: not measured."""
    outcome: str
    """One of OUTCOMES; "" for a measured exploratory claim."""
    p_holm: float = np.nan
    """Holm-adjusted one-sided p value of the side that the estimate lies on, for primary claims with an interval; else nan."""
    seeds_needed: int | None = None
    """Seeds, of each network, with which an undecided claim would be decided; None: no number up to 1,000, or not undecided."""
    sentence: str = ""
