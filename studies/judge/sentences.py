"""A sentence for a reader on each claim that was judged."""

import math

from studies.judge.claims import CONTRADICTED, NO_EFFECT, NOT_MEASURED, PROVED, SUPPORTED, UNDECIDED, Claim, Estimate
from studies.judge.power import LEVEL, MOST_SEEDS

PLAIN = {
    SUPPORTED: "The whole 95 % interval is beyond the margin on the claimed side.",
    CONTRADICTED: "The whole 95 % interval is beyond the margin on the other side.",
    NO_EFFECT: "The whole 90 % interval is inside the margin: no effect that matters.",
    UNDECIDED: "The interval is neither beyond the margin nor inside it.",
    PROVED: "A theorem, which the numbers agree with.",
    "": "Exploratory: an estimate without a verdict.",
}
"""Outcome -> what is said where a claim says nothing itself."""
PLAIN_EQUIVALENCE = PLAIN | {
    SUPPORTED: "The whole 90 % interval is inside the margin, as claimed.",
    CONTRADICTED: "The whole 95 % interval is beyond the margin.",
}
NO_INTERVAL = "No interval: fewer than two seeds, or networks, that are independent."


def sentence(
    claim: Claim,
    outcome: str,
    estimate: Estimate | None,
    *,
    p_holm: float = math.nan,
    family: int = 1,
    survives: bool = True,
    seeds: int | None = None,
) -> str:
    """What the claim says of its outcome or, failing that, a plain sentence, and what a reader must know besides.

    Args:
        claim: the claim.
        outcome: its outcome, "" for an exploratory one.
        estimate: its estimate, None where it was not measured.
        p_holm: the adjusted p value.
        family: how many claims it is corrected for.
        survives: False where the interval decides the claim and the correction takes that back.
        seeds: the seeds that would decide it.
    """
    if estimate is None or outcome == NOT_MEASURED:
        return claim.says.get(NOT_MEASURED) or not_measured(claim.study)
    plain = PLAIN_EQUIVALENCE if claim.compare.claimed == "within" else PLAIN
    texts = [
        claim.says.get(outcome) or ("" if _silent(estimate, survives) and outcome == UNDECIDED else plain[outcome])
    ]
    if estimate.censored:
        texts.append(f"Censored seeds: {estimate.censored}, so the value is a bound without an interval.")
    elif not estimate.has_interval:
        texts.append(NO_INTERVAL)
    if not survives:
        texts.append(
            f"The interval is beyond the margin, but not after correction for {family} claims (Holm: p = {p_holm:.2g} > {LEVEL})."
        )
    if outcome == UNDECIDED and estimate.has_interval:
        texts.append(_power(seeds, estimate.networks))
    if estimate.left_out:
        noun = "seed" if estimate.left_out == 1 else "seeds"
        texts.append(
            f"Without {estimate.left_out} {noun} that have a value missing, not finite or at the end of its scale."
        )
    return " ".join(text for text in texts if text)


def not_measured(study: str) -> str:
    """The command that would measure what was not measured."""
    return (
        f"Not measured: `python -m studies {study}` would." if study else "Not measured: there is no study of it yet."
    )


def _silent(estimate: Estimate, survives: bool) -> bool:
    """Whether another sentence says already why a claim is undecided."""
    return not survives or not estimate.has_interval


def _power(seeds: int | None, networks: int) -> str:
    where = f" in each of {networks} networks" if networks > 1 else ""
    if seeds is None:
        return f"No number of seeds up to {MOST_SEEDS:,}{where} would decide it, were effect and scatter as seen."
    return f"{seeds} seeds{where} would decide it with a power of 80 %, were effect and scatter as seen."
