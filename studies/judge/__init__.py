"""Claims as data, judged on records with five outcomes: see `claims`, `comparisons`, `estimates` and `verdicts`."""

from studies.judge.claims import (
    CONTRADICTED,
    NO_EFFECT,
    NOT_MEASURED,
    OUTCOMES,
    PROVED,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Estimate,
    Judged,
)
from studies.judge.comparisons import Bound, Comparison, Difference, Equivalence, Interaction, Ratio
from studies.judge.estimates import estimate
from studies.judge.power import seeds_needed
from studies.judge.primary import NOT_YET, PRIMARY, complete, contrast, primary
from studies.judge.verdicts import holm, judge, outcome

__all__ = [
    "CONTRADICTED",
    "NOT_MEASURED",
    "NOT_YET",
    "NO_EFFECT",
    "OUTCOMES",
    "PRIMARY",
    "PROVED",
    "SUPPORTED",
    "UNDECIDED",
    "Bound",
    "Claim",
    "Comparison",
    "Difference",
    "Equivalence",
    "Estimate",
    "Interaction",
    "Judged",
    "Ratio",
    "complete",
    "contrast",
    "estimate",
    "holm",
    "judge",
    "outcome",
    "primary",
    "seeds_needed",
]
