"""A sentence for a reader on each claim that was judged."""

from studies.judge.claims import CONTRADICTED, NO_EFFECT, NOT_MEASURED, PROVED, SUPPORTED, UNDECIDED, Claim, Estimate
from studies.judge.comparisons import WITHIN
from studies.judge.power import MOST_SEEDS

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


def sentence(claim: Claim, outcome: str, estimate: Estimate, seeds: int | None, lost: str) -> str:
    """What the claim says of its outcome or, failing that, a plain sentence, and what a reader must know besides.

    `seeds` would decide it; `lost` says why it is undecided though its interval decides it.
    """
    explained = outcome == UNDECIDED and (lost or not estimate.has_interval)  # by another sentence
    texts = [claim.says.get(outcome, "") if explained else in_words(claim, outcome)]
    if estimate.censored:
        texts.append(f"Censored seeds: {estimate.censored}, so the value is a bound without an interval.")
    elif not estimate.has_interval:
        texts.append(NO_INTERVAL)
    texts.append(lost)
    if outcome == UNDECIDED and estimate.has_interval:
        texts.append(_power(seeds, estimate.networks))
    if estimate.left_out:
        seeds_have = "1 seed that has" if estimate.left_out == 1 else f"{estimate.left_out} seeds that have"
        texts.append(f"Without {seeds_have} a value missing, not finite or at the end of its scale.")
    return " ".join(text for text in texts if text)


def in_words(claim: Claim, outcome: str) -> str:
    """What the claim says of an outcome or, failing that, a plain sentence."""
    plain = PLAIN_EQUIVALENCE if claim.compare.claimed == WITHIN else PLAIN
    return claim.says.get(outcome) or plain[outcome]


def not_measured(claim: Claim) -> str:
    """What the claim says of it or, failing that, the command that would measure it."""
    command = f"`python -m studies {claim.study}` would" if claim.study else "there is no study of it yet"
    return claim.says.get(NOT_MEASURED) or f"Not measured: {command}."


def _power(seeds: int | None, networks: int) -> str:
    where = f" in each of {networks} networks" if networks > 1 else ""
    if seeds is None:
        return f"No number of seeds up to {MOST_SEEDS:,}{where} would decide it, were effect and scatter as seen."
    return f"{seeds} seeds{where} would decide it with a power of 80 %, were effect and scatter as seen."
