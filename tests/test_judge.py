"""Claims judged: outcomes, Holm's correction, the table, and the nine primary claims."""

import dataclasses
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from judge_records import BELOW_GAP, GAP, GCP, claim, ratios, records, scatter
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from secondorder.errors import InputError
from studies.judge import (
    CONTRADICTED,
    NO_EFFECT,
    NOT_MEASURED,
    PRIMARY,
    PROVED,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Comparison,
    Difference,
    Equivalence,
    Judged,
    Ratio,
    complete,
    estimate,
    judge,
)
from studies.judge.power import seeds_needed
from studies.judge.verdicts import holm, outcome
from studies.study import STUDIES

ABOVE_GAP = Ratio(GCP, GAP, "above", margin=0.1)
AS_GAP = Equivalence(Ratio(GCP, GAP, margin=0.1))
LOW, HIGH, T90, T95 = math.log(0.9), math.log(1.1), *stats.t.ppf([0.95, 0.975], 7)


@pytest.mark.parametrize(
    ("mean", "error", "below", "above", "within"),
    [
        (LOW - 0.25, 0.1, SUPPORTED, CONTRADICTED, CONTRADICTED),
        (HIGH + 0.25, 0.1, CONTRADICTED, SUPPORTED, CONTRADICTED),
        (LOW - 0.21, 0.1, UNDECIDED, UNDECIDED, UNDECIDED),  # only the 90 % interval is beyond
        (LOW + 0.021, 0.01, NO_EFFECT, NO_EFFECT, SUPPORTED),  # only the 90 % interval is inside
        (LOW + 0.018, 0.01, UNDECIDED, UNDECIDED, UNDECIDED),
        (0.0, 0.5, UNDECIDED, UNDECIDED, UNDECIDED),
    ],
)
def test_outcome(mean: float, error: float, below: str, above: str, within: str) -> None:
    assert 0.018 < T90 * 0.01 < 0.021 < T95 * 0.01 < 0.025
    seen = estimate(BELOW_GAP, ratios(scatter(mean, error * math.sqrt(8), 8)))
    assert seen is not None
    assert [outcome(seen, claimed) for claimed in ("below", "above", "within")] == [below, above, within]


def only(claims: list[Any], table: pd.DataFrame) -> Judged:
    (case,) = judge(claims, table)
    return case


@pytest.mark.parametrize(
    ("logs", "compare", "word"),
    [
        (scatter(-0.3, 0.1, 8), BELOW_GAP, SUPPORTED),
        (scatter(-0.3, 0.1, 8), ABOVE_GAP, CONTRADICTED),
        (scatter(0.01, 0.05, 8), BELOW_GAP, NO_EFFECT),
        (scatter(0.01, 0.05, 8), AS_GAP, SUPPORTED),
        (scatter(-0.15, 0.1, 8), BELOW_GAP, UNDECIDED),
        (np.array([-0.3]), BELOW_GAP, UNDECIDED),
        (scatter(-0.3, 0.1, 8), Ratio(GCP, {"head": "covariance"}), NOT_MEASURED),
    ],
)
def test_a_primary_claim_has_its_outcome(logs: np.ndarray, compare: Comparison, word: str) -> None:
    table = records(ratios(logs))
    case = only([claim(compare=compare, says={word: "So it is."})], table)
    assert case.outcome == word
    assert case.sentence.startswith("So it is.") or word == UNDECIDED
    assert only([claim(compare=compare, primary=0)], table).outcome == (NOT_MEASURED if word == NOT_MEASURED else "")


def test_undecided_says_how_many_seeds_would_do() -> None:
    case = only([claim()], records(ratios(scatter(math.log(0.854), 0.121, 8))))
    assert (case.outcome, case.seeds_needed) == (UNDECIDED, 44)
    assert "44 seeds would decide it" in case.sentence
    edge = only([claim()], records(ratios(scatter(math.log(0.9), 0.121, 8))))
    assert (edge.outcome, edge.seeds_needed) == (UNDECIDED, None)
    assert "No number of seeds up to 1,000" in edge.sentence
    alone = only([claim()], records(ratios([-0.3])))
    assert (alone.outcome, alone.seeds_needed) == (UNDECIDED, None)
    assert "No interval" in alone.sentence


def test_holm_is_statsmodels() -> None:
    p = [0.001, 0.02, 0.01, 0.5]
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.01, math.nan, 0.02]) == pytest.approx([0.03, math.nan, 0.04], nan_ok=True)
    assert holm([]) == []


def family(means: list[float], n: int = 8) -> tuple[list[Any], pd.DataFrame]:
    """Primary claims 1, 2, ... with log ratios of these means, and the records of all."""
    names = [f"claim {i}" for i in range(1, len(means) + 1)]
    tables = [records(ratios(scatter(m, 0.1, n)), quantity=name) for name, m in zip(names, means, strict=True)]
    return [claim(name, primary=i) for i, name in enumerate(names, 1)], pd.concat(tables)


def test_what_does_not_survive_holm_is_undecided_and_says_so() -> None:
    claims, table = family([-0.5, -0.2, -0.2])
    alone = only(claims[1:2], table)
    p = stats.t.cdf((-0.2 - math.log(0.9)) / (0.1 / math.sqrt(8)), 7)
    assert 0.025 / 2 < p < 0.025
    assert (alone.outcome, alone.p_holm) == (SUPPORTED, pytest.approx(p))
    strong, weak, _ = judge(claims, table)
    assert strong.outcome == SUPPORTED
    assert (weak.outcome, weak.p_holm) == (UNDECIDED, pytest.approx(2 * p))
    assert "not after correction for 3 claims (Holm: p = 0.032 > 0.025)" in weak.sentence
    zone = (math.log(0.9), math.log(1.1))
    assert weak.seeds_needed == seeds_needed(-0.2, 0.1, zone, level=0.025 / 3) != seeds_needed(-0.2, 0.1, zone)


def test_the_family_are_the_measured_primary_claims_of_one_data_set() -> None:
    claims, table = family([-0.5, -0.2, -0.2])
    others = [
        claim("explored", primary=0),
        claim("theorem", primary=4, proved=True),
        claim("elsewhere", primary=5, study="curvature"),
    ]
    losses = [records(ratios(scatter(-0.2, 0.1, 8)), dataset) for dataset in ("digits", "cifar10")]
    larger = pd.concat([table, *losses])
    by_name = {(case.claim.name, case.dataset): case for case in judge([*claims, *others], larger)}
    assert by_name["claim 2", "digits"].p_holm == pytest.approx(judge(claims, table)[1].p_holm)
    assert by_name["elsewhere", "digits"].outcome == NOT_MEASURED
    assert by_name["theorem", "cifar10"].outcome == PROVED
    assert math.isnan(by_name["explored", "digits"].p_holm)


def test_an_equivalence_is_corrected_at_its_level() -> None:
    """Supported by the 90 % interval: its p value is tested at 5 %, twice the level of a claimed side."""
    logs = scatter(0.03, 0.08, 8)
    case = only([claim(compare=AS_GAP)], records(ratios(logs)))
    p = DescrStatsW(logs).ttost_mean(LOW, HIGH)[0]
    assert 0.025 < p < 0.05
    assert (case.outcome, case.p_holm) == (SUPPORTED, pytest.approx(p / 2))


@pytest.mark.parametrize(("mean", "end", "side"), [(-0.3, LOW, "less"), (0.3, HIGH, "greater")])
def test_p_values_are_those_of_the_ends_of_the_zone(mean: float, end: float, side: str) -> None:
    logs = scatter(mean, 0.3, 5)
    p = stats.ttest_1samp(logs, end, alternative=side).pvalue
    for compare in (BELOW_GAP, ABOVE_GAP, AS_GAP):
        assert only([claim(compare=compare)], records(ratios(logs))).p_holm == pytest.approx(p)


def test_a_theorem_is_proved_unless_its_check_contradicts_it() -> None:
    for mean, word in ((-0.3, PROVED), (-0.1, PROVED), (0.3, CONTRADICTED)):
        case = only([claim(proved=True, primary=0)], records(ratios(scatter(mean, 0.1, 8))))
        assert case.outcome == word


def test_censored_values_decide_nothing() -> None:
    table = records(ratios(scatter(-0.5, 0.1, 8))).assign(censored=[True] + 15 * [False])
    case = only([claim()], table)
    assert (case.outcome, case.seeds_needed) == (UNDECIDED, None)
    assert "Censored seeds: 1" in case.sentence


def test_values_that_claims_share_are_computed_once_for_each_study() -> None:
    asked: list[str] = []

    def values(of: pd.DataFrame) -> pd.DataFrame:
        asked.append(of.study.iloc[0])
        return of

    studies = {"landscape": -0.5, "curvature": 0.5}
    found = pd.concat([records(ratios([log, log + 0.01]), study=study) for study, log in studies.items()])
    claims = [
        dataclasses.replace(claim(f"{study} {n}", study=study, primary=0), values=values)
        for study in studies
        for n in (1, 2)
    ]
    estimates = [case.estimate.value for case in judge(claims, found) if case.estimate is not None]
    assert estimates == pytest.approx(np.exp([-0.495, -0.495, 0.505, 0.505]))
    assert asked == ["landscape", "curvature"]


def test_no_records_and_no_study() -> None:
    empty = records(ratios([-0.3])).iloc[:0]
    assert [(case.dataset, case.outcome) for case in judge([claim()], empty)] == [("", NOT_MEASURED)]
    assert only([claim()], empty).sentence == "Not measured: `python -m studies landscape` would."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns=["layer", "index"]), "the records lack the columns layer, index; they have "),
        (lambda t: t.assign(head="gpc"), "unknown head 'gpc'; choose one of: gap,"),
        (lambda t: t.assign(trained_under="gpc"), "unknown trained under 'gpc'"),
        (lambda t: t.assign(dataset=None), "the records have no dataset in row 0"),
        (
            lambda t: pd.concat([t, t]),
            "claim 'smoother loss': network digits_net, seed 0: more than one value of head gcp",
        ),
        (lambda t: "records", "the records: must be a pandas DataFrame, not 'records'"),
    ],
)
def test_bad_records(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge([claim()], change(records(ratios([-0.3, -0.2]))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: judge([claim("a"), claim("a", primary=2)], records(ratios([-0.3]))), "two claims are called 'a'"),
        (lambda: judge([claim("a"), claim("b")], records(ratios([-0.3]))), "'a' and 'b' are both primary claim 1"),
        (lambda: judge(["a"], records(ratios([-0.3]))), "claim 'a': must be a Claim"),  # type: ignore[list-item]
        (lambda: claim(primary=10), "primary of claim 'smoother loss' must be a whole number from 0 to 9, got 10"),
        (lambda: claim(" "), "name of a claim ' ': must be words"),
        (lambda: claim(study=None), "study None must be a name"),
        (lambda: Claim("a", "A.", "landscape", "loss", BELOW_GAP), "values None must be a function of the records"),
        (lambda: claim(compare="below"), "compare 'below' must be a comparison such as Ratio"),  # type: ignore[arg-type]
        (lambda: claim(says={"maybe": "?"}), "unknown outcome in says of claim 'smoother loss' 'maybe'"),
        (lambda: claim(proved="yes"), "proved of claim 'smoother loss' must be True or False, got 'yes'"),
    ],
)
def test_bad_claims(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_the_nine_primary_claims_are_complete() -> None:
    assert [claim.primary for claim in PRIMARY] == list(range(1, 10))
    assert all(claim.study in STUDIES for claim in PRIMARY)
    own = claim("robust", Difference(GCP, GAP), primary=8)
    claims = complete([own, claim("explored", primary=0)])
    assert [c.primary for c in claims] == list(range(1, 10))
    assert claims[7] is own
    judged = judge(claims, records(ratios([-0.3, -0.2])))
    assert {case.outcome for case in judged if case.claim is not own} == {NOT_MEASURED}
    assert all("python -m studies" in case.sentence for case in judged if case.claim is not own)
