"""The nine primary claims, written down before the runs that decide them: numbers, names, statements and margins.

A study says with `Claim.measured` which values decide one; `complete` fills in those that no study does, as not measured.
"""

from collections.abc import Iterable

from studies.judge.claims import Claim, Values
from studies.judge.comparisons import Bound, Difference, Interaction, Ratio
from studies.judge.verdicts import check_claims

GCP, GAP = {"head": "gcp"}, {"head": "gap"}


def primary(number: int) -> Claim:
    """The primary claim of a number, 1 to 9, as not measured."""
    return PRIMARY[number - 1]


def complete(claims: Iterable[Claim]) -> list[Claim]:
    """The nine primary claims in order, those of `claims` where it has them, else as not measured; exploratory ones are left out.

    InputError when two of `claims` have the same number or name.
    """
    supplied = list(claims)
    check_claims(supplied)
    by_number = {claim.primary: claim for claim in supplied}
    return [by_number.get(claim.primary, claim) for claim in PRIMARY]


def contrast(
    name: str, study: str, quantity: str, values: Values, of: str = "gcp", to: str = "gap", margin: float = 0.1
) -> Claim:
    """The exploratory ratio of a quantity under head `of` to that under head `to`, which are added to name and quantity.

    `values` has the column head; ratios from 1 - margin to 1 + margin count as no effect.
    """
    statement = f"Is it smaller under {of} than under {to}?"
    ratio = Ratio({"head": of}, {"head": to}, margin=margin)
    return Claim(f"{name}: {of} / {to}", statement, study, f"{quantity}, {of} / {to}", ratio, values)


PRIMARY = (
    Claim("smoother loss",
          "The loss of a GCP network is smoother: the first-order prediction of its change along -g errs less.",
          "landscape", "|L(X - eta g) - L + eta |g|^2| / (eta |g|^2) at eta = rho L / |g|^2, GCP / GAP",
          Ratio(GCP, GAP, margin=0.1), primary=1),
    Claim("predictive gradients",
          "The gradients of a GCP network are more predictive: they change less along -g.",
          "landscape", "|g(eta) - g| / |g| at eta = rho L / |g|^2, GCP / GAP",
          Ratio(GCP, GAP, margin=0.1), primary=2),
    Claim("head preconditions",
          "The published head preconditions: its Jacobian is nearly as well conditioned as that of the exact root.",
          "preconditioning",
          "median over images of the condition number of the head's Jacobian, 5 Newton-Schulz steps, against 2",
          Bound(GCP, "below", reference=2.0, scale="log"), primary=3),
    Claim("better conditioned weights",
          "The curvature of the weights below GCP is better conditioned than below GAP.",
          "curvature", "lambda_1 / lambda_k of the GGN's blocks, networks trained to a stated accuracy, GCP / GAP",
          Ratio(GCP, GAP, margin=0.2), primary=4),
    Claim("K-FAC-like gradient",
          "The gradient of a GCP network is like one that K-FAC preconditions.",
          "preconditioning", "partial correlation of g_GCP with P g_GAP given g_GAP",
          Bound(GCP, "above", reference=0.0, margin=0.1, scale="fisher"), primary=5),
    Claim("second order superfluous",
          "GCP makes second-order steps superfluous: K-FAC speeds up a GCP network less than a GAP network.",
          "optimisers", "log of steps to the target, SGD / K-FAC, GCP - GAP",
          Interaction(GCP, GAP, {"optimizer": "sgd"}, {"optimizer": "kfac"}, "below", margin=0.1), primary=6),
    Claim("converges under rapid decay",
          "A GCP network under the fast schedule is as accurate as a GAP network under the normal one, or more.",
          "convergence", "test top-1 after the last epoch, GCP under the fast schedule - GAP under the normal one",
          Difference(GCP | {"schedule": "fast"}, GAP | {"schedule": "norm"}, margin=0.005, scale="logit"), primary=7),
    Claim("robust to corruptions",
          "A GCP network is more robust to corruptions of its images.",
          "robustness", "relative mean corruption error, GCP / GAP",
          Ratio(GCP, GAP, margin=0.05), primary=8),
    Claim("transfers",
          "A GCP backbone transfers better: a detector that is fine-tuned from it is more precise.",
          "transfer",
          "average precision of boxes of a fine-tuned detector, mean over data and budgets, backbone trained under GCP - GAP",
          Difference({"trained_under": "gcp"}, {"trained_under": "gap"}, margin=0.005, scale="logit"), primary=9),
)  # fmt: skip
"""By number, each without values: not measured."""
