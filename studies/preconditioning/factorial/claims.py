"""The predictions of part E and their verdicts: main effects, and the interactions of head and optimiser."""

import math

from studies.optimisers.measures import REFERENCE
from studies.optimisers.settings import ARMS
from studies.preconditioning.factorial.measures import COMMON, OWN, Bounded, Factorial, interaction, interval, ratio
from studies.report.section import Claim
from studies.report.style import label
from studies.statistics import NOT_SUPPORTED, SUPPORTED, UNDECIDED, with_error

GROUP = "E: factorial training"
FIRST, CONTRASTS = "kfac", ("gap", "covariance")
"""The optimiser whose interaction is predicted, and the poolings that GCP is compared with."""
EXACT = "gauss_newton"
WOULD, AGAINST = (
    {
        "gap": "as it would if GCP already preconditioned",
        "covariance": "as it would if the root already preconditioned",
    },
    {
        "gap": "against GCP as a preconditioner that makes it superfluous",
        "covariance": "the root does not make it superfluous",
    },
)
"""What an interaction below and above 0 says, of each pooling that GCP is compared with."""


def name(optimiser: str) -> str:
    """The name of an optimiser for a reader."""
    return ARMS[optimiser].label


def all_claims(factorial: Factorial) -> list[Claim]:
    """Main effects, then the interactions of each second-order optimiser."""
    second = [o for o in (FIRST, EXACT) if o in factorial.optimisers]
    claims = [faster(factorial, optimiser, pooling) for optimiser in second for pooling in ("gap", "gcp")]
    claims.append(gcp_faster(factorial))
    for optimiser in second:
        for other in (p for p in CONTRASTS if p in factorial.poolings):
            claims += interactions(factorial, optimiser, other)
    return claims


def faster(factorial: Factorial, optimiser: str, pooling: str) -> Claim:
    """Steps to SGD's own final loss."""
    found = ratio(list(factorial.speed_ups(OWN, pooling, optimiser).values()))
    head = label(pooling)
    claim = Claim(
        f"{head}: {name(optimiser)} needs fewer steps than tuned SGD to the training loss that SGD ends at (ratio below 1).",
        f"steps, {name(optimiser)} / SGD",
        found,
        group=GROUP,
        headline=optimiser == FIRST,
    )
    return said(
        claim,
        f"second-order steps help under {head}: {name(optimiser)} takes {found.estimate:.2g} times SGD's steps to its final loss",
        f"second-order steps do not help under {head}, so there is nothing that the head could have done in their place",
        f"whether {name(optimiser)} helps under {head} is open",
    )


def gcp_faster(factorial: Factorial) -> Claim:
    """Steps of SGD to the common target."""
    sgd = {p: {s: factorial.steps(COMMON, p, REFERENCE, s) for s in factorial.seeds} for p in ("gap", "gcp")}
    pairs = [(sgd["gap"][s], sgd["gcp"][s]) for s in factorial.seeds]
    found = ratio([gap.log() - gcp.log() for gap, gcp in pairs if gap is not None and gcp is not None])
    claim = Claim(
        "Under SGD, GCP needs fewer steps than GAP to the common target loss (ratio below 1).",
        "steps, GCP / GAP",
        found,
        group=GROUP,
        headline=True,
    )
    return said(
        claim,
        f"GCP itself speeds up SGD: {found.estimate:.2g} times the steps of GAP",
        "GCP does not speed up SGD here, unlike a preconditioner would",
        "whether GCP speeds up SGD is open",
    )


def interactions(factorial: Factorial, optimiser: str, other: str) -> list[Claim]:
    """Speed-up (or gain in final loss) under GCP minus that under another pooling: predicted below 0."""
    own, head = name(optimiser), label(other)
    common, final, own_target = "in steps to the common target", "in the final training loss", "to SGD's final loss"
    rows: list[tuple[str, str, list[Bounded]]] = [
        (common, "log speed-up in steps to the common target", _steps(factorial, COMMON, optimiser, other)),
        (
            f"in steps {own_target} under the same head",
            f"log speed-up in steps {own_target}",
            _steps(factorial, OWN, optimiser, other),
        ),
        (
            final,
            "log gain in final loss",
            interaction(factorial.gains("gcp", optimiser), factorial.gains(other, optimiser)),
        ),
        (
            "in seconds to the common target",
            "log speed-up in seconds to the common target",
            _steps(factorial, COMMON, optimiser, other, "seconds"),
        ),
    ]
    claims = []
    for words, quantity, values in rows:
        found = interval(values)
        if "seconds" in quantity:
            found = with_error(found, math.hypot(*(factorial.clock.log_error(p) for p in ("gcp", other))))
        claim = Claim(
            f"{own} helps GCP less than {head} {words} (interaction below 0).",
            f"{quantity}, GCP minus {head}",
            found,
            "below",
            0.0,
            GROUP,
            headline=words == common or (words == final and other == "gap"),
        )
        claims.append(
            said(
                claim,
                f"{words}, {own} helps GCP less than {head}, {WOULD[other]}",
                f"{words}, {own} helps GCP more than {head}: {AGAINST[other]}",
                f"{words}, whether {own} helps GCP less than {head} is open",
            )
        )
    return claims


def _steps(factorial: Factorial, kind: str, optimiser: str, other: str, what: str = "steps") -> list[Bounded]:
    return interaction(
        factorial.speed_ups(kind, "gcp", optimiser, what), factorial.speed_ups(kind, other, optimiser, what)
    )


def said(claim: Claim, supported: str, not_supported: str, undecided: str) -> Claim:
    """The claim with the sentence that its verdict has."""
    words = {SUPPORTED: supported, NOT_SUPPORTED: not_supported, UNDECIDED: undecided}
    return claim.meant({verdict: f"{sentence[0].upper()}{sentence[1:]}." for verdict, sentence in words.items()})


def control(factorial: Factorial, claims: list[Claim]) -> str:
    """Whether the exact preconditioner shows the interaction of K-FAC (theory T6.4)."""
    if not {FIRST, EXACT} <= set(factorial.optimisers):
        return f"without {name(EXACT)} an interaction of K-FAC may come from its Kronecker model fitting worse below a GCP head."
    verdicts = {
        o: next(c.verdict for c in claims if c.statement.startswith(f"{name(o)} helps GCP less than {label('gap')}"))
        for o in (FIRST, EXACT)
    }
    both = f"steps to the common target, GCP against GAP: {verdicts[FIRST]} with K-FAC, {verdicts[EXACT]} with exact Gauss-Newton"
    conclusions = {
        SUPPORTED: "the interaction persists with the exact preconditioner and speaks for GCP preconditioning already",
        NOT_SUPPORTED: "K-FAC's interaction comes from its approximation, not from GCP preconditioning already",
        UNDECIDED: "whether K-FAC's interaction comes from its approximation is open",
    }
    if verdicts[FIRST] != SUPPORTED:
        return f"{both}: no interaction of K-FAC is shown that the exact preconditioner could confirm."
    return f"{both}: {conclusions[verdicts[EXACT]]}."
