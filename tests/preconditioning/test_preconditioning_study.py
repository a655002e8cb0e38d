"""The preconditioning study: its claims on made-up records, its page, a run end to end, and bad settings."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from studies.__main__ import main
from studies.engine.records import Origins, frame, read_records
from studies.engine.study import Results
from studies.judge import CONTRADICTED, NO_EFFECT, PROVED, SUPPORTED, UNDECIDED, Judged, judge
from studies.preconditioning import blocks, gradients, heads
from studies.preconditioning.claims import BACKWARD, CONTROLS, FORMS, NEARER, TURNED, WITHOUT
from studies.preconditioning.page import _turned, folds, unrelated
from studies.preconditioning.study import STUDY

SMOKE = ["preconditioning", "--preset", "smoke", "--no-progress", "--threads", "1"]
HEADS = ("gap", "gap_lifted", "covariance", "gcp", "gcp_exact")
CONDITIONS = {"gap": 1.0, "gap_lifted": 1.5, "covariance": 30.0, "gcp": 6.0, "gcp_exact": 1.3}
PARTIALS = {"gap_lifted": 0.0, "covariance": 0.1, "gcp": 0.3, "gcp_exact": 0.3}
ENDS = {"": 0.0, f", {gradients.RANDOM}": -0.2, f", {gradients.PERMUTED}": -0.3}
"""Variant of GCP -> what its partial correlation is above that of GCP."""
OTHERS = {"P^1/4": 0.1, "P^1/2": 0.2, gradients.MUON: -0.1}
"""Other ways to turn a gradient than K-FAC's -> what the partial correlation of GCP with them is above that of GCP."""
BLOCKS = {blocks.CONDITION: 100.0, blocks.AFTER_KFAC: 40.0, blocks.AFTER_EXACT: 5.0, blocks.COSINE: 0.5}


def made_up(
    conditions: Mapping[str, float] = CONDITIONS,
    partial: float = 0.3,
    gcp_blocks: Mapping[str, float] = BLOCKS,
    scatter: float = 0.02,
    seeds: int = 5,
) -> pd.DataFrame:
    """Records in which heads have these condition numbers, GCP this partial correlation, and its blocks these values."""
    random, rows = np.random.default_rng(0), []
    for seed, (under, step) in product(range(seeds), (("", 0), ("gap", 100), ("gcp", 100))):
        at = {"network": "digits_net", "dataset": "digits", "seed": seed, "step": step, "trained_under": under}
        noise = float(np.exp(scatter * random.standard_normal()))
        for head, number in conditions.items():
            for setting in (1.0, 5.0) if head == "gcp" else (np.nan,):
                size = number * (noise if head != "gcp_exact" else 1.0) * (10.0 if setting == 1.0 else 1.0)
                row = at | {"head": head, "setting": setting}
                rows += [row | {"quantity": q, "value": size} for q in (heads.CONDITION, heads.WORST)]
        rows.append(at | {"head": under or "gap", "quantity": heads.FEATURES, "value": 900.0})
        for layer in (*blocks.ROLES, gradients.ALL) if under else ():
            rows += [
                at | row | {"layer": layer} for row in gradient_rows_of(partial + scatter * random.standard_normal())
            ]
        for head, layer in product(HEADS, blocks.ROLES) if under else ():
            values = gcp_blocks if head == "gcp" else BLOCKS
            rows += [at | {"head": head, "layer": layer, "quantity": q, "value": v * noise} for q, v in values.items()]
        for form, quantity in product(FORMS, heads.COSINES.values()) if under else ():
            cosine = 0.85 if form == WITHOUT else 0.9
            rows.append(at | {"head": "gcp", "layer": form, "quantity": quantity, "value": cosine / noise**0.1})
    return frame("preconditioning", rows, {}, "fake")


def gradient_rows_of(partial: float) -> list[dict[str, Any]]:
    """Rows of one layer: cosines 0.5 and 0.4, and 0.2 + 0.05 with P."""
    rows: list[dict[str, Any]] = []
    for damping in (0.01, 1.0):
        rows.append({"head": "gap", "quantity": gradients.TURN, "setting": damping, "value": 0.4})
        for head, end in [*((h, "") for h in HEADS if h != "gap"), *(("gcp", e) for e in ENDS if e)]:
            value = partial + ENDS[end] if head == "gcp" else PARTIALS[head]
            value = value if damping == 0.01 else 0.9
            rows.append({"head": head, "quantity": gradients.PARTIAL + end, "setting": damping, "value": value})
            rows.append({"head": head, "quantity": gradients.WITH_P + end, "setting": damping, "value": 0.25})
            if damping == 1.0:
                rows.append({"head": head, "quantity": gradients.PLAIN + end, "value": 0.5})
    for name, more in OTHERS.items():
        at = {"head": "gcp", "setting": np.nan if name == gradients.MUON else 0.01}
        rows.append(at | {"quantity": f"{gradients.PARTIAL}, {name}", "value": partial + more})
    return rows


@cache
def as_claimed() -> Results:
    """Records as `made_up` gives them, with what they say; not to be written into."""
    return results(made_up())


def judged(records: pd.DataFrame, *names: str) -> dict[str, Judged]:
    """Primary claims, whose outcomes depend on one another, and those of these names; of no names, all."""
    claims = [claim for claim in STUDY.claims if not names or claim.primary or claim.name in names]
    return {case.claim.name: case for case in judge(claims, records)}


def estimate(case: Judged) -> float:
    assert case.estimate is not None
    return case.estimate.value


# ---------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("condition", "scatter", "outcome"), [(1.5, 0.02, SUPPORTED), (6.0, 0.02, CONTRADICTED), (2.1, 0.3, UNDECIDED)]
)
def test_the_published_head_is_judged_at_its_own_steps(condition: float, scatter: float, outcome: str) -> None:
    name = "head preconditions"
    case = judged(made_up(CONDITIONS | {"gcp": condition}, scatter=scatter), name)[name]
    assert case.outcome == outcome
    assert estimate(case) == pytest.approx(condition, rel=3 * scatter)  # not ten times that, of one step


@pytest.mark.parametrize(
    ("partial", "scatter", "outcome"),
    [(0.3, 0.02, SUPPORTED), (-0.3, 0.02, CONTRADICTED), (0.0, 0.02, NO_EFFECT), (0.1, 0.5, UNDECIDED)],
)
def test_partial_correlations_are_judged_at_the_default_damping(partial: float, scatter: float, outcome: str) -> None:
    names = "K-FAC-like gradient", "partial correlation: trained under GAP", "turned gradient: natural gradient"
    cases = judged(made_up(partial=partial, scatter=scatter), *names)
    assert cases["K-FAC-like gradient"].outcome == outcome
    assert estimate(cases["K-FAC-like gradient"]) == pytest.approx(partial, abs=max(0.03, scatter))  # not 0.9, at 1
    assert cases["partial correlation: trained under GAP"].outcome == ""
    assert cases["turned gradient: natural gradient"].estimate is None


def test_the_theorem_is_proved_unless_the_numbers_contradict_it() -> None:
    name = "exact root within √2"
    for condition, outcome in ((CONDITIONS["gcp_exact"], PROVED), (2**0.5, PROVED), (1.5, CONTRADICTED)):
        assert judged(made_up(CONDITIONS | {"gcp_exact": condition}), name)[name].outcome == outcome


def test_values_of_the_other_claims() -> None:
    cases = judged(made_up(gcp_blocks=BLOCKS | {blocks.CONDITION: 50.0, blocks.COSINE: 0.25}, scatter=0.0))
    assert estimate(cases["head condition: gcp / covariance"]) == pytest.approx(0.2)
    assert estimate(cases["head condition: gcp_exact / gcp"]) == pytest.approx(1.3 / 6)
    assert estimate(cases["partial correlation: one vector of all convolutions"]) == pytest.approx(0.3)
    differences = [estimate(cases[claim.name]) for claim in CONTROLS]
    assert differences == pytest.approx([0.2, 0.0, 0.3, 0.2, 0.3])
    turned = {claim.name: estimate(cases[claim.name]) for claim in TURNED[:-1]}
    assert list(turned.values()) == pytest.approx([0.3, 0.4, 0.5, 0.2])
    assert [estimate(cases[claim.name]) for claim in NEARER[:-1]] == pytest.approx([0.1, 0.2, -0.1])
    assert [estimate(cases[claim.name]) for claim in BACKWARD] == pytest.approx([0.05] * 3)
    assert estimate(cases["block condition: gcp / gap"]) == pytest.approx(0.5)
    assert estimate(cases["gain by K-FAC: gcp − gap"]) == pytest.approx(np.log(0.5))
    assert estimate(cases["gain by an exact preconditioner: gcp − gap"]) == pytest.approx(np.log(0.5))
    assert estimate(cases["fit of K-FAC: gcp / gap"]) == pytest.approx(0.5)


def test_a_block_without_a_condition_leaves_its_seed_out() -> None:
    records = made_up()
    [first, *_] = records.index[(records["head"] == "gcp") & (records.quantity == blocks.CONDITION)]
    records.loc[first, "value"] = np.nan
    name = "block condition: gcp / gap"
    case = judged(records, name)[name]
    assert case.estimate is not None
    assert case.estimate.left_out == 1


# ------------------------------------------------------------------------------------------------------------------ page


def results(records: pd.DataFrame) -> Results:
    settings = asdict(STUDY.presets["quick"])
    return Results(records, Origins("preconditioning", settings), judge(STUDY.claims, records))


def test_folds_say_what_came_out() -> None:
    heads, directions, passes, curvature = folds(as_claimed())
    assert [fold.number for fold in (heads, directions, passes, curvature)] == [3, 5, 0, 0]
    assert "at most √2: proved" in heads.sentences[0]
    assert "900 (untrained)" in heads.sentences[1]
    table = heads.tables[0].data.set_index("head")
    assert list(table.columns) == ["untrained", "trained under GAP", "trained under GCP"]
    assert table.loc["GCP (5-step root)", "untrained"] == pytest.approx(6.0, rel=0.05)
    assert "is 0.250" in directions.sentences[0]
    assert "= 0.200" in directions.sentences[0]
    assert "100 % lie above" in directions.pictures[1].caption
    assert "more than the margin of K-FAC's P, P^1/4, P^1/2, Muon." in directions.pictures[2].caption
    assert len(directions.shown_controls) == len(CONTROLS)
    assert "no preconditioner 0.85" in passes.sentences[0]
    assert "100 % of the blocks" in curvature.pictures[0].caption


@pytest.mark.parametrize(
    ("partial", "words"),
    [(0.05, "more than the margin of P^1/4, P^1/2."), (-0.2, "more than the margin of none of these for certain")],
)
def test_the_ways_to_turn_a_gradient_beyond_the_margin_are_named(partial: float, words: str) -> None:
    names = [claim.name for claim in TURNED[:-1]]  # the last is not measured
    cases = judged(made_up(partial=partial), *names)
    assert words in _turned([cases[name] for name in names])[0].caption


def test_an_unrelated_preconditioner_predicts_the_product_of_the_cosines() -> None:
    points = unrelated(made_up(scatter=0.0, seeds=1).assign(backbone="b"))
    assert points.predicted.to_numpy() == pytest.approx(0.2)
    assert points.measured.to_numpy() == pytest.approx(0.25)


def test_folds_of_one_seed_and_fewer_heads() -> None:
    records = made_up(seeds=1)
    few = records[records["head"].isin(("gap", "gcp"))]
    found = folds(results(few))
    assert len(found) == 4
    assert "nan" not in " ".join(sentence for fold in found for sentence in fold.sentences)


# ------------------------------------------------------------------------------------------------------------ end to end


def undrawn(figure: object, folder: Path, name: str) -> None:
    for suffix in ("svg", "png"):
        (folder / f"{name}.{suffix}").touch()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished study."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:  # drawing takes most of the time
        patch.setattr("studies.page.writing.save", undrawn)
        assert main([*SMOKE, "--seeds", "1", "--processes", "1", "--out", str(folder)]) == 0
    return folder


def test_everything_is_measured_where_it_should_be(finished: Path) -> None:
    records = read_records(finished, "preconditioning")[0]
    measured = records[~records.quantity.str.contains("train|test|seconds|learning")]
    assert set(measured[measured.step == 0].quantity) == {
        heads.CONDITION,
        heads.WORST,
        heads.FEATURES,
    }
    for under in ("gap", "gcp"):
        part = measured[measured.trained_under == under]
        assert {heads.CONDITION, gradients.PARTIAL, blocks.CONDITION} <= set(part.quantity)
        assert set(part[part.quantity == gradients.PARTIAL]["head"]) == {"covariance", "gcp"}
        assert set(part.seed) == {0}
    primary = judge([claim for claim in STUDY.claims if claim.primary], records)
    assert [case.claim.primary for case in primary] == [3, 5]
    assert all(case.estimate is not None and case.estimate.n == 1 for case in primary)
    report = (finished / "report.md").read_text()
    assert "3 · head preconditions" in report
    assert "What K-FAC leaves to do below each head" in report


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--network", "resnet19"], "unknown backbone 'resnet19'"),
        (["--trained", "gpc"], "unknown pooling 'gpc'; choose one of: gap"),
        (["--heads", "gap", "gpc"], "unknown pooling 'gpc'; choose one of: gap"),
        (["--heads", "gap"], "--heads gap: must have 'gcp' among them"),
        (["--dampings"], "--dampings (none): name at least one"),
        (["--dampings", "0.1", "0.1"], "--dampings 0.1 0.1: name at least one, each once"),
        (["--dampings", "0"], "--dampings 0: every value must be above 0"),
        (["--newton-schulz-steps", "0"], "--newton-schulz-steps 0: at least 1"),
        (["--images", "1"], "--images 1: at least 2"),
        (["--curvature-images", "1"], "--curvature-images 1: at least 2"),
        (["--penalty", "0"], "weight_decay 0.0: a shared backbone needs a positive one"),
        (["--train-limit", "64", "--batch-size", "65"], "65"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, refused: Callable[..., None]) -> None:
    refused(words, *SMOKE, *arguments)


def test_a_dry_run_trains_and_measures_a_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMOKE, "--dry-run", "--out", str(tmp_path / "none")]) == 0
    printed = capsys.readouterr().out
    assert "digits_tiny + gcp" in printed
    assert "2 seeds of 2 networks" in printed
    assert not (tmp_path / "none").exists()
