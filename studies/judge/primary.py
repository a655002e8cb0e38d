"""The nine primary claims, written down before the runs that decide them: numbers, names, statements and margins.

A study supplies a `Claim` with its values; `complete` fills in those that no study supplies, which come out as not measured.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from secondorder.errors import InputError
from studies.judge.claims import NOT_MEASURED, Claim
from studies.judge.comparisons import Bound, Comparison, Difference, Interaction, Ratio
from studies.judge.verdicts import check_claims

GCP, GAP = {"head": "gcp"}, {"head": "gap"}
Values = Callable[[pd.DataFrame], pd.DataFrame]


@dataclass(frozen=True)
class Primary:
    """A primary claim without the values that decide it; study "" while no study measures them: then `command` is planned."""

    number: int
    name: str
    statement: str
    study: str
    quantity: str
    compare: Comparison
    command: str = ""

    def claim(self) -> Claim:
        """The claim as not measured."""
        planned = f"Not measured: no study of it yet; planned is `{self.command}`."
        return Claim(
            self.name,
            self.statement,
            self.study,
            self.quantity,
            self.compare,
            _nothing,
            self.number,
            {} if self.study else {NOT_MEASURED: planned},
        )

    def measured(self, values: Values, says: Mapping[str, str] | None = None) -> Claim:
        """The claim as a study measures it: see `Claim` for `values` and `says`."""
        return replace(self.claim(), values=values, says=says or {})


def primary(number: int) -> Primary:
    """The primary claim of a number, 1 to 9."""
    return PRIMARY[number - 1]


def contrast(
    name: str, study: str, quantity: str, values: Values, of: str = "gcp", to: str = "gap", margin: float = 0.1
) -> Claim:
    """The exploratory ratio of a quantity under one head to that under another.

    Args:
        name: what is compared, in few words; the heads are added.
        study: on whose records.
        quantity: what is compared, in words with its formula; the heads are added.
        values: as of `Claim`, with the column head.
        of: head of the numerator.
        to: head of the denominator.
        margin: share of 1 that counts as no effect.
    """
    statement = f"Is it smaller under {of} than under {to}?"
    ratio = Ratio({"head": of}, {"head": to}, margin=margin)
    return Claim(f"{name}: {of} / {to}", statement, study, f"{quantity}, {of} / {to}", ratio, values)


def _nothing(records: pd.DataFrame) -> pd.DataFrame:
    """No values, whatever the records."""
    return records.iloc[:0]


PRIMARY = (
    Primary(
        1,
        "smoother loss",
        "The loss of a GCP network is smoother: the first-order prediction of its change along -g errs less.",
        "landscape",
        "|L(X - eta g) - L + eta |g|^2| / (eta |g|^2) at eta = rho L / |g|^2, GCP / GAP",
        Ratio(GCP, GAP, margin=0.1),
    ),
    Primary(
        2,
        "predictive gradients",
        "The gradients of a GCP network are more predictive: they change less along -g.",
        "landscape",
        "|g(eta) - g| / |g| at eta = rho L / |g|^2, GCP / GAP",
        Ratio(GCP, GAP, margin=0.1),
    ),
    Primary(
        3,
        "head preconditions",
        "The published head preconditions: its Jacobian is nearly as well conditioned as that of the exact root.",
        "preconditioning",
        "median over images of the condition number of the head's Jacobian, 5 Newton-Schulz steps, against 2",
        Bound(GCP, "below", reference=2.0, scale="log"),
    ),
    Primary(
        4,
        "better conditioned weights",
        "The curvature of the weights below GCP is better conditioned than below GAP.",
        "curvature",
        "lambda_1 / lambda_k of the GGN's blocks, networks trained to a stated accuracy, GCP / GAP",
        Ratio(GCP, GAP, margin=0.2),
    ),
    Primary(
        5,
        "K-FAC-like gradient",
        "The gradient of a GCP network is like one that K-FAC preconditions.",
        "preconditioning",
        "partial correlation of g_GCP with P g_GAP given g_GAP",
        Bound(GCP, "above", reference=0.0, margin=0.1, scale="fisher"),
    ),
    Primary(
        6,
        "second order superfluous",
        "GCP makes second-order steps superfluous: K-FAC speeds up a GCP network less than a GAP network.",
        "optimisers",
        "log of steps to the target, SGD / K-FAC, GCP - GAP",
        Interaction(GCP, GAP, {"optimizer": "sgd"}, {"optimizer": "kfac"}, "below", margin=0.1),
    ),
    Primary(
        7,
        "converges under rapid decay",
        "A GCP network under the fast schedule is as accurate as a GAP network under the normal one, or more.",
        "",
        "accuracy, GCP under the fast schedule - GAP under the normal one",
        Difference(
            {"head": "gcp", "schedule": "resnet_fast"},
            {"head": "gap", "schedule": "resnet_norm"},
            "above",
            margin=0.005,
            scale="logit",
        ),
        "python -m studies convergence",
    ),
    Primary(
        8,
        "robust to corruptions",
        "A GCP network is more robust to corruptions of its images.",
        "",
        "relative mean corruption error, GCP / GAP",
        Ratio(GCP, GAP, margin=0.05),
        "python -m studies robustness",
    ),
    Primary(
        9,
        "transfers",
        "A GCP backbone transfers better: a detector that is fine-tuned from it is more precise.",
        "",
        "average precision of a fine-tuned detector, backbone trained under GCP - under GAP",
        Difference({"trained_under": "gcp"}, {"trained_under": "gap"}, "above", margin=0.005, scale="logit"),
        "python -m studies transfer",
    ),
)
NOT_YET = tuple(primary for primary in PRIMARY if not primary.study)
"""Those that no study measures yet."""


def complete(claims: Iterable[Claim]) -> list[Claim]:
    """The nine primary claims in order, those of `claims` where it has them, else as not measured; exploratory ones are left out.

    InputError when two of `claims` have the same number or name.
    """
    supplied = list(claims)
    check_claims(supplied)
    by_number = {claim.primary: claim for claim in supplied if claim.primary}
    numbers = {primary.number for primary in PRIMARY}
    if strange := sorted({*by_number} - numbers):
        raise InputError(f"primary claim {strange[0]}: there is none of this number")
    return [by_number.get(primary.number) or primary.claim() for primary in PRIMARY]
