"""The outcome of every claim on every data set: by its intervals, and for primary claims corrected for their number (Holm)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from statsmodels.stats.multitest import multipletests

from secondorder.errors import InputError, short
from studies.judge.cells import ABOVE, WITHIN, check_records
from studies.judge.claims import (
    CONTRADICTED,
    NO_EFFECT,
    NOT_MEASURED,
    PROVED,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Estimate,
    Judged,
)
from studies.judge.comparisons import Comparison
from studies.judge.estimates import effects_of, estimate_of, mean_of, zone_of
from studies.judge.power import INSIDE_LEVEL, LEVEL, seeds_needed
from studies.judge.sentences import sentence


def outcome(estimate: Estimate, compare: Comparison) -> str:
    """What the intervals of an estimate say of a comparison.

    - supported: the whole 95 % interval is beyond the zone of practical equivalence on the claimed side,
    - contradicted: it is beyond the zone on the other side,
    - no effect: the whole 90 % interval is inside the zone,
    - undecided: none of these; so too without an interval (one seed, a censored value).

    Of an Equivalence: supported where the 90 % interval is inside, contradicted where the 95 % interval is beyond on either side.
    """
    low, high = compare.zone
    if not estimate.has_interval:
        return UNDECIDED
    if low <= estimate.low90 and estimate.high90 <= high and low < high:
        return SUPPORTED if compare.claimed == WITHIN else NO_EFFECT
    below, above = estimate.high < low, estimate.low > high
    if compare.claimed == WITHIN:
        return CONTRADICTED if below or above else UNDECIDED
    if below or above:
        return SUPPORTED if above == (compare.claimed == ABOVE) else CONTRADICTED
    return UNDECIDED


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
        cases = [_case(claim, records[records.dataset == dataset]) for claim in claims]
        family = [case for case in cases if case.tested]
        adjusted = holm([case.p for case in family])
        corrected = {case.claim.name: p for case, p in zip(family, adjusted, strict=True)}
        for case in cases:
            judged.append(case.judged(str(dataset), corrected.get(case.claim.name, math.nan), len(family)))
    return judged


def check_claims(claims: Sequence[Claim]) -> None:
    """InputError unless these are claims, no two with the same name or primary number."""
    for claim in claims:
        if not isinstance(claim, Claim):
            raise InputError(f"claim {short(claim)}: must be a Claim")
    names, numbers = [claim.name for claim in claims], [claim.primary for claim in claims if claim.primary]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two claims are called {name!r}; names must be unique")
    for number in numbers:
        if numbers.count(number) > 1:
            same = " and ".join(repr(claim.name) for claim in claims if claim.primary == number)
            raise InputError(f"{same} are both primary claim {number}; make all but one exploratory (primary=0)")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; nan counts as 1 and stays nan."""
    if not p_values:
        return []
    adjusted = multipletests([1.0 if math.isnan(p) else p for p in p_values], method="holm")[1]
    return [math.nan if math.isnan(p) else float(a) for p, a in zip(p_values, adjusted, strict=True)]


@dataclass(frozen=True)
class _Case:
    """A claim with its estimate on one data set, before the correction for several claims."""

    claim: Claim
    estimate: Estimate | None = None
    effect: float = math.nan
    sd: float = math.nan
    between: float = math.nan
    zone: tuple[float, float] = (math.nan, math.nan)

    @property
    def tested(self) -> bool:
        """Whether it is of the family that Holm's correction is for."""
        return self.claim.primary > 0 and self.estimate is not None and not self.claim.proved

    @property
    def p(self) -> float:
        """The smaller p value of both sides, at LEVEL; that of an equivalence is tested at twice as much and hence halved."""
        assert self.estimate is not None
        half = 0.5 if self.claim.compare.claimed == WITHIN else 1.0
        return min(half * self.estimate.p_supported, self.estimate.p_contradicted)

    def judged(self, dataset: str, p_holm: float, family: int) -> Judged:
        """The outcome, when the claim is one of a `family` and has the adjusted p value `p_holm`."""
        if self.estimate is None:
            return Judged(
                self.claim, dataset, None, NOT_MEASURED, math.nan, None, sentence(self.claim, NOT_MEASURED, None)
            )
        by_interval = outcome(self.estimate, self.claim.compare)
        # a theorem is proved, whatever the scatter of its check, unless the check contradicts it
        word = PROVED if self.claim.proved and by_interval != CONTRADICTED else by_interval
        if not self.claim.primary and not self.claim.proved:
            word = ""
        survives = not self.tested or word not in (SUPPORTED, CONTRADICTED) or p_holm <= LEVEL
        word = word if survives else UNDECIDED
        seeds = self._seeds_needed(max(family, 1)) if word == UNDECIDED else None
        text = sentence(self.claim, word, self.estimate, p_holm=p_holm, family=family, survives=survives, seeds=seeds)
        return Judged(self.claim, dataset, self.estimate, word, p_holm, seeds, text)

    def _seeds_needed(self, family: int) -> int | None:
        """Seeds at the level of the strictest of Holm's tests, LEVEL / family; "no effect" is not corrected for."""
        assert self.estimate is not None
        if self.estimate.censored:
            return None
        within = self.claim.compare.claimed == WITHIN
        return seeds_needed(
            self.effect,
            self.sd,
            self.zone,
            networks=self.estimate.networks,
            between=self.between,
            level=LEVEL / family,
            inside_level=INSIDE_LEVEL / family if within else INSIDE_LEVEL,
        )


def _case(claim: Claim, records: pd.DataFrame) -> _Case:
    """The claim with its estimate from the records of one data set."""
    measured = records[records.study == claim.study]
    if measured.empty:
        return _Case(claim)
    try:
        effects = effects_of(claim.compare, claim.values(measured))
    except InputError as error:
        raise InputError(f"claim {claim.name!r}: {error}") from None
    if effects is None:
        return _Case(claim)
    mean = mean_of(effects.table)
    estimate = estimate_of(claim.compare, effects)
    return _Case(claim, estimate, mean.value, mean.sd, mean.between, zone_of(claim.compare, effects.center))
