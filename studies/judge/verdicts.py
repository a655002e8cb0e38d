"""The outcome of every claim on every data set: by its intervals, and for primary claims corrected for their number (Holm)."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from secondorder.errors import InputError, short
from studies.judge.cells import check_records
from studies.judge.claims import CONTRADICTED, NO_EFFECT, NOT_MEASURED, PROVED, SUPPORTED, UNDECIDED, Claim, Judged
from studies.judge.comparisons import ABOVE, BELOW, WITHIN
from studies.judge.estimates import Estimate, estimate
from studies.judge.power import INSIDE_LEVEL, LEVEL, seeds_needed
from studies.judge.sentences import not_measured, sentence


def outcome(estimate: Estimate, claimed: str) -> str:
    """What the intervals of an estimate say of the claim that it lies on a side of its zone, or within it.

    - supported: the whole 95 % interval is beyond the zone of practical equivalence on the claimed side,
    - contradicted: it is beyond the zone on the other side,
    - no effect: the whole 90 % interval is inside the zone,
    - undecided: none of these; so too without an interval (one seed, a censored value).

    Of "within": supported where the 90 % interval is inside, contradicted where the 95 % interval is beyond on either side.
    """
    if not estimate.has_interval:
        return UNDECIDED
    low, high = estimate.zone
    (low95, high95), (low90, high90) = estimate.mean.interval(0.95), estimate.mean.interval(0.90)
    if low <= low90 and high90 <= high and low < high:
        return SUPPORTED if claimed == WITHIN else NO_EFFECT
    if low <= high95 and low95 <= high:
        return UNDECIDED
    side = BELOW if high95 < low else ABOVE
    return SUPPORTED if side == claimed else CONTRADICTED


def judge(claims: Sequence[Claim], records: pd.DataFrame) -> list[Judged]:
    """All claims on each data set of the records, in the order of both.

    A primary claim is supported or contradicted only if its Holm-adjusted one-sided p value is at most LEVEL, too. The family is
    the primary claims of the data set that were measured, but for theorems; those without an interval count with p = 1.
    Exploratory claims have no outcome. With no records there is one row for each claim, not measured, of the data set "".

    Raises InputError for records that lack columns or name unknown heads, for claims with the same name or primary number, and
    for values of a claim that lack columns or hold two values for one cell.
    """
    check_claims(claims)
    check_records(records)
    judged: list[Judged] = []
    for dataset in records.dataset.unique() if len(records) else [""]:
        studies = dict([*records[records.dataset == dataset].groupby("study", sort=False)])
        values: dict[tuple[str, str], pd.DataFrame] = {}
        estimates = [(claim, _estimate(claim, studies.get(claim.study), values)) for claim in claims]
        p_values = {c.name: _p_value(c, e) for c, e in estimates if e is not None and c.primary and not c.proved}
        adjusted = dict(zip(p_values, holm([*p_values.values()]), strict=True))
        judged += [_judged(claim, str(dataset), found, adjusted) for claim, found in estimates]
    return judged


def check_claims(claims: Sequence[Claim]) -> None:
    """InputError unless these are claims, no two with the same name or primary number."""
    for claim in claims:
        if not isinstance(claim, Claim):
            raise InputError(f"claim {short(claim)}: must be a Claim")
    for claim, other in combinations(claims, 2):
        if claim.name == other.name:
            raise InputError(f"two claims are called {claim.name!r}; names must be unique")
        if claim.primary and claim.primary == other.primary:
            both = f"{claim.name!r} and {other.name!r} are both primary claim {claim.primary}"
            raise InputError(f"{both}; make all but one exploratory (primary=0)")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; nan counts as 1 and stays nan."""
    if not p_values:
        return []
    adjusted = multipletests(np.nan_to_num(p_values, nan=1.0), method="holm")[1]
    return np.where(np.isnan(p_values), np.nan, adjusted).tolist()


def _estimate(
    claim: Claim, measured: pd.DataFrame | None, values: dict[tuple[str, str], pd.DataFrame]
) -> Estimate | None:
    """The estimate of the claim from its study's records of one data set; None where it was not measured.

    `values` keeps what claims of the data set share: the numbers that one function makes of the records of one study.
    """
    if measured is None or claim.values is None:
        return None
    key = claim.study, repr(claim.values)  # of functools.partial the function and its arguments
    try:
        if key not in values:
            values[key] = claim.values(measured)
        return estimate(claim.compare, values[key])
    except InputError as error:
        raise InputError(f"claim {claim.name!r}: {error}") from None


def _p_value(claim: Claim, estimate: Estimate) -> float:
    """The smallest one-sided p value, at LEVEL, of the outcomes "supported" and "contradicted"."""
    mean, (low, high) = estimate.mean, estimate.zone
    beyond = min(mean.p_value(low - mean.value), mean.p_value(mean.value - high))
    if claim.compare.claimed != WITHIN:
        return beyond
    inside = max(mean.p_value(mean.value - low), mean.p_value(high - mean.value))
    return min(inside / 2, beyond)  # tested at twice LEVEL


def _judged(claim: Claim, dataset: str, estimate: Estimate | None, adjusted: dict[str, float]) -> Judged:
    """The claim with its outcome; `adjusted` are the Holm-adjusted p values of its family, by the names of claims."""
    if estimate is None:
        return Judged(claim, dataset, None, NOT_MEASURED, sentence=not_measured(claim))
    word, lost = outcome(estimate, claim.compare.claimed), ""
    p, family = adjusted.get(claim.name, np.nan), len(adjusted)
    if claim.proved:  # whatever the scatter of its check, unless the check contradicts it
        word = CONTRADICTED if word == CONTRADICTED else PROVED
    elif not claim.primary:
        word = ""
    elif word in (SUPPORTED, CONTRADICTED) and p > LEVEL:
        word = UNDECIDED
        lost = f"The interval is beyond the margin, but not after correction for {family} claims (Holm: p = {p:.2g} > {LEVEL})."
    seeds = None
    if word == UNDECIDED:  # at the level of the strictest of Holm's tests; "no effect" is not corrected for
        mean = estimate.mean
        seeds = seeds_needed(
            mean.value,
            mean.sd,
            estimate.zone,
            networks=estimate.networks,
            between=mean.between,
            level=LEVEL / family,
            inside_level=INSIDE_LEVEL / family if claim.compare.claimed == WITHIN else INSIDE_LEVEL,
        )
    return Judged(claim, dataset, estimate, word, p, seeds, sentence(claim, word, estimate, seeds, lost))
