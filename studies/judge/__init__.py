"""Claims as data, judged on records with five outcomes: see `claims`, `comparisons`, `estimates` and `verdicts`."""

from studies.judge.claims import CONTRADICTED, NO_EFFECT, NOT_MEASURED, PROVED, SUPPORTED, UNDECIDED, Claim, Judged
from studies.judge.comparisons import Bound, Comparison, Difference, Equivalence, Interaction, Ratio
from studies.judge.estimates import Estimate, estimate
from studies.judge.primary import PRIMARY, complete, contrast, primary
from studies.judge.verdicts import judge

__all__ = [
    "CONTRADICTED",
    "NOT_MEASURED",
    "NO_EFFECT",
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
    "judge",
    "primary",
]
