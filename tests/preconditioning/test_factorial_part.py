"""Part E of the preconditioning study: bounds, intervals and verdicts on tables with a known answer, and one small run."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from secondorder.data import ImageDataset, load_dataset
from secondorder.errors import InputError
from studies.optimisers.settings import TUNING_SEED
from studies.preconditioning.factorial import training
from studies.preconditioning.factorial.claims import all_claims, control
from studies.preconditioning.factorial.measures import COMMON, OWN, Bounded, Factorial, interaction, interval, ratio
from studies.preconditioning.factorial.section import part
from studies.preconditioning.settings import PRESETS, FactorialSettings, Settings
from studies.results import write_table
from studies.settings import Common
from studies.statistics import mean_interval

POOLINGS, OPTIMISERS, SEEDS, STEPS = ("gap", "covariance", "gcp"), ("sgd", "kfac", "gauss_newton"), 5, 100
PARALLEL = {"sgd": 1.0, "kfac": 2.0, "gauss_newton": 3.0}
"""Speed of each optimiser, the same under every head."""


def tables(speeds: dict[tuple[str, str], float], noise: float = 0.01, seeds: int = SEEDS) -> dict[str, pd.DataFrame]:
    """Runs with the loss exp(-speed step / 50), speeds by pooling and optimiser, times 1 + noise x standard normal numbers."""
    random = np.random.default_rng(0)
    epochs, curves, trials, costs = [], [], [], []
    for (pooling, optimiser), speed in speeds.items():
        key = {"pooling": pooling, "optimiser": optimiser}
        for seed in range(seeds):
            own = speed * (1 + noise * random.standard_normal())
            losses = {step: math.exp(-own * step / 50) for step in range(1, STEPS + 1)}
            curves += [key | {"seed": seed, "step": step, "loss": loss} for step, loss in losses.items()]
            for epoch in (1, 2):
                row = {"epoch": epoch, "step": 50 * epoch, "train_loss": losses[50 * epoch], "test_loss": 1.0}
                epochs.append(key | {"seed": seed} | row | {"test_top1": 0.9, "seconds": 1.0})
        for trial in (1, 2, 3):
            settings = {"first_parameter": "learning_rate", "first_value": 0.1 * trial, "second_parameter": "momentum"}
            row = {"second_value": 0.9, "train_loss": float(trial), "diverged": False, "chosen": trial == 1}
            trials.append(key | {"trial": trial} | settings | row)
        milliseconds = {"sgd": 1.0, "kfac": 4.0, "gauss_newton": 10.0}[optimiser]
        costs += [key | {"step": step, "milliseconds": milliseconds} for step in range(4)]
    frames = (pd.DataFrame(rows) for rows in (epochs, curves, trials, costs))
    return dict(zip((training.NAME, training.CURVES, training.TRIALS, training.COSTS), frames, strict=True))


def speeds(heads: dict[str, float], optimisers: dict[str, float], **special: float) -> dict[tuple[str, str], float]:
    """The product of both, but for cells `pooling_optimiser`."""
    pairs = itertools.product(heads, optimisers)
    return {(p, o): special.get(f"{p}_{o}", heads[p] * optimisers[o]) for p, o in pairs}


HEADS = {"gap": 1.0, "covariance": 1.5, "gcp": 2.0}


def factorial(own: dict[str, pd.DataFrame]) -> Factorial:
    return Factorial(own[training.NAME], own[training.CURVES], own[training.COSTS])


def write(folder: Path, own: dict[str, pd.DataFrame]) -> None:
    for name, table in own.items():
        write_table(folder, name, table)


# ------------------------------------------------------------------------------------------------- bounds and intervals


def test_bounds_go_through_differences_and_logarithms() -> None:
    censored, known = Bounded(101.0, 101.0, math.inf).log(), Bounded(50.0, 50.0, 50.0).log()
    assert known - censored == Bounded(math.log(50) - math.log(101), -math.inf, math.log(50) - math.log(101))
    both = (known - censored) - (known - censored)
    assert both == Bounded(0.0, -math.inf, math.inf)


def test_an_interval_of_known_numbers_is_the_t_interval() -> None:
    values = [0.3, -0.1, 0.7, 0.4]
    assert interval([Bounded(v, v, v) for v in values]) == mean_interval(values)


def test_the_ends_of_an_interval_are_those_of_the_bounds() -> None:
    values = [0.3, -0.1, 0.7, 0.4]
    found = interval([*(Bounded(v, v, v) for v in values), Bounded(-0.5, -math.inf, -0.5)])
    assert found.low == -math.inf
    assert found.high == mean_interval([*values, -0.5]).high
    assert found.n == 5
    inverted = ratio([*(Bounded(v, v, v) for v in values), Bounded(-0.5, -math.inf, -0.5)])
    assert (inverted.low, inverted.high) == (math.exp(-found.high), math.inf)


def test_targets_are_sgds_final_losses() -> None:
    own = factorial(tables(speeds(HEADS, PARALLEL), noise=0.0))
    assert own.target(OWN, "gcp", 0) == pytest.approx(math.exp(-4))
    for pooling in POOLINGS:
        assert own.target(COMMON, pooling, 0) == pytest.approx(math.exp(-2))
    assert own.steps(COMMON, "gap", "sgd", 0) == Bounded(100.0, 100.0, 100.0)
    assert own.steps(COMMON, "gcp", "kfac", 0) == Bounded(25.0, 25.0, 25.0)
    assert own.steps(OWN, "gcp", "kfac", 0) == Bounded(50.0, 50.0, 50.0)
    assert own.seconds(COMMON, "gcp", "kfac", 0) == Bounded(*3 * [pytest.approx(0.1)])


def test_a_run_that_never_reaches_the_target_is_a_lower_bound() -> None:
    own = factorial(tables(speeds(HEADS, PARALLEL, gcp_kfac=0.5), noise=0.0))
    assert own.steps(COMMON, "gcp", "kfac", 0) == Bounded(101.0, 101.0, math.inf)
    assert own.censored(COMMON, "gcp", "kfac") == SEEDS
    ups = own.speed_ups(COMMON, "gcp", "kfac")
    assert len(ups) == SEEDS
    assert {up.low for up in ups.values()} == {-math.inf}
    assert [up.high for up in ups.values()] == pytest.approx([math.log(50 / 101)] * SEEDS)


def test_a_run_that_begins_below_the_target_is_an_upper_bound() -> None:
    own = factorial(tables(speeds(HEADS, PARALLEL, gcp_kfac=200.0), noise=0.0))
    assert own.steps(COMMON, "gcp", "kfac", 0) == Bounded(1.0, 1.0, 1.0)
    frames = tables(speeds(HEADS, PARALLEL), noise=0.0)
    late = frames[training.CURVES]
    frames[training.CURVES] = late[late.step >= 30]  # the smoothed curve begins here
    assert factorial(frames).steps(COMMON, "gcp", "kfac", 0) == Bounded(30.0, 1.0, 30.0)


def test_without_sgd_there_is_no_target_of_that_seed() -> None:
    frames = tables(speeds(HEADS, PARALLEL), noise=0.0)
    for name in (training.CURVES, training.NAME):
        column = "loss" if name == training.CURVES else "train_loss"
        own = frames[name]
        lost = (own.pooling == "gap") & (own.optimiser == "sgd") & (own.seed == 0)
        frames[name].loc[lost, column] = math.inf
    own_factorial = factorial(frames)
    assert own_factorial.target(OWN, "gap", 0) is None
    assert own_factorial.target(COMMON, "gap", 0) == pytest.approx(math.exp(-3))  # of the covariance
    assert set(own_factorial.speed_ups(OWN, "gap", "kfac")) == {1, 2, 3, 4}
    assert own_factorial.censored(COMMON, "gap", "sgd") == 1


def test_a_diverged_run_leaves_the_final_loss_open() -> None:
    frames = tables(speeds(HEADS, PARALLEL), noise=0.0)
    own = frames[training.NAME]
    own.loc[(own.pooling == "gcp") & (own.optimiser == "kfac") & (own.seed == 2), "train_loss"] = math.inf
    found = factorial(frames)
    values = interaction(found.gains("gcp", "kfac"), found.gains("gap", "kfac"))
    assert len(values) == SEEDS
    assert (interval(values).low, interval(values).high) == (-math.inf, math.inf)


# --------------------------------------------------------------------------------------------------------------- claims


def verdicts(own: dict[tuple[str, str], float]) -> dict[str, str]:
    return {claim.statement: claim.verdict for claim in all_claims(factorial(tables(own, noise=0.02)))}


def one(found: dict[str, str], *words: str) -> str:
    (statement,) = (s for s in found if all(w in s for w in words))
    return found[statement]


def test_the_interaction_is_negative_zero_or_positive_as_built() -> None:
    less = verdicts(speeds(HEADS, PARALLEL, gcp_kfac=2.4, gcp_gauss_newton=6.0))
    more = verdicts(speeds(HEADS, PARALLEL, gcp_kfac=8.0))
    for words in ("in steps to the common target", "in steps to SGD's", "in seconds to the common target"):
        assert one(less, "K-FAC helps GCP less than GAP", words) == "supported"
        assert one(more, "K-FAC helps GCP less than GAP", words) == "not supported"
        assert one(less, "K-FAC helps GCP less than covariance", words) == "supported"
        assert one(less, "Gauss-Newton by CG helps GCP less than GAP", words) == "undecided"


def test_main_effects_have_verdicts_of_their_own() -> None:
    found = verdicts(speeds(HEADS, PARALLEL, gcp_kfac=1.0))
    assert one(found, "GAP: K-FAC needs fewer steps") == "supported"
    assert one(found, "GCP (5-step root): K-FAC needs fewer steps") == "not supported"  # never reached
    assert one(found, "Under SGD, GCP needs fewer steps than GAP") == "supported"
    slow = verdicts(speeds({"gap": 2.0, "covariance": 1.0, "gcp": 1.0}, PARALLEL))
    assert one(slow, "Under SGD, GCP needs fewer steps than GAP") == "not supported"


def test_every_claim_has_a_meaning_that_its_verdict_chooses() -> None:
    claims = all_claims(factorial(tables(speeds(HEADS, PARALLEL, gcp_kfac=2.4))))
    assert all(claim.group == "E: factorial training" for claim in claims)
    means = {c.statement: c.meaning for c in claims}
    less = next(m for s, m in means.items() if s.startswith("K-FAC helps GCP less than GAP in steps to the common"))
    assert "helps GCP less than GAP, as it would if GCP already preconditioned" in less
    root = next(
        m for s, m in means.items() if s.startswith("K-FAC helps GCP less than covariance (no root) in steps to t")
    )
    assert root.endswith("helps GCP less than covariance (no root), as it would if the root already preconditioned.")
    assert all(m.endswith(".") and m[0].isupper() for m in means.values())
    shown = [claim.statement for claim in claims if claim.headline and "interaction" in claim.statement]
    assert (
        sum("in steps to the common target" in s for s in shown) == 4
    )  # against GAP and covariance, of both optimisers
    assert sum("in the final training loss" in s for s in shown) == 2


@pytest.mark.parametrize(
    ("special", "words"),
    [
        ({"gcp_kfac": 2.4, "gcp_gauss_newton": 3.0}, "persists with the exact preconditioner"),
        ({"gcp_kfac": 2.4, "gcp_gauss_newton": 12.0}, "comes from its approximation"),
        ({"gcp_kfac": 2.4}, "is open"),
        ({"gcp_kfac": 8.0}, "no interaction of K-FAC is shown"),
    ],
)
def test_the_control_speaks_for_the_claim_only_with_the_exact_preconditioner(
    special: dict[str, float], words: str
) -> None:
    own = factorial(tables(speeds(HEADS, PARALLEL, **special), noise=0.02))
    assert words in control(own, all_claims(own))


def test_without_the_exact_preconditioner_the_remark_says_what_is_missing() -> None:
    own = factorial(tables(speeds(HEADS, {"sgd": 1.0, "kfac": 2.0})))
    assert "may come from its Kronecker model" in control(own, all_claims(own))


# -------------------------------------------------------------------------------------------------------------- section


def test_the_table_has_a_row_for_each_cell_and_marks_bounds(tmp_path: Path) -> None:
    write(tmp_path, tables(speeds(HEADS, PARALLEL, gcp_kfac=0.5), noise=0.0))
    own = part(tmp_path)
    assert own is not None
    table = own.tables[0].data.set_index(["head", "optimiser"])
    assert len(table) == 9
    assert not table.isna().any(axis=None)
    known = table.loc[("GCP (5-step root)", "Gauss-Newton by CG")]
    assert known["tuned"] == "learning rate 0.1, momentum 0.9"
    assert known["epochs to the common target"] == "0.34"  # step 17 of 50
    assert known["seconds to the common target, of SGD's"] == "3.40"  # 17 steps of 10 ms, 50 of 1 ms
    bound = table.loc[("GCP (5-step root)", "K-FAC")]
    assert bound["epochs to the common target"] == "≥ 2.02"
    assert any("5 of 45 runs never reach the common target" in words for words in own.remarks)
    assert any("largest or smallest" in words for words in own.remarks)


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_are_drawn_and_left_undecided_or_wide(tmp_path: Path, seeds: int) -> None:
    write(tmp_path, tables(speeds(HEADS, PARALLEL, gcp_kfac=0.5), seeds=seeds))
    own = part(tmp_path)
    assert own is not None
    assert [picture.name for picture in own.pictures] == [
        "preconditioning_factorial_curves",
        "preconditioning_factorial",
    ]
    assert f"n = {seeds} seeds" in own.pictures[0].caption
    assert {claim.interval.n for claim in own.claims} == {seeds}
    if seeds == 1:
        assert {claim.verdict for claim in own.claims} == {"undecided"}


def test_without_the_tables_there_is_no_part(tmp_path: Path) -> None:
    assert part(tmp_path) is None


# -------------------------------------------------------------------------------------------------------------- running


SMALL = dataclasses.replace(
    PRESETS["smoke"],
    train_limit=192,
    factorial=FactorialSettings(
        poolings=("gap", "gcp"), train_limit=128, epochs=1, trials=2, trial_epochs=1, seeds=2, timing_steps=2
    ),
)


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", None, download=False, limit=192)


def common(folder: Path, **changes: Any) -> Common:
    return Common(preset="smoke", out=folder, threads=1, progress=False, **changes)


@pytest.fixture(scope="module")
def done(data: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, pd.DataFrame]]:
    folder = tmp_path_factory.mktemp("factorial")
    return folder, training.run(common(folder), SMALL, data, folder / "runs")


def test_every_cell_has_the_same_trials_and_every_seed(done: tuple[Path, dict[str, pd.DataFrame]]) -> None:
    own = done[1]
    assert set(own) == {training.NAME, training.CURVES, training.TRIALS, training.COSTS}
    cells = {(p, o) for p in ("gap", "gcp") for o in OPTIMISERS}
    for name, rows in ((training.NAME, 2), (training.TRIALS, 2), (training.COSTS, 2)):
        assert own[name].groupby(["pooling", "optimiser"]).size().to_dict() == dict.fromkeys(cells, rows)
    assert own[training.TRIALS].groupby(["pooling", "optimiser"]).chosen.sum().eq(1).all()
    assert TUNING_SEED not in set(own[training.NAME].seed)
    assert not any(table.isna().any(axis=None) for table in own.values())


def test_a_run_that_is_resumed_trains_nothing_again(
    done: tuple[Path, dict[str, pd.DataFrame]], data: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, own = done

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("studies.optimisers.runs.train", refuse)
    again = training.run(common(folder, resume=True), SMALL, data, folder / "runs")
    for name in (training.NAME, training.CURVES, training.TRIALS):
        pd.testing.assert_frame_equal(again[name], own[name])


def test_the_section_of_a_small_run_can_be_made(done: tuple[Path, dict[str, pd.DataFrame]], tmp_path: Path) -> None:
    write(tmp_path, done[1])
    own = part(tmp_path)
    assert own is not None
    assert len(own.tables[0].data) == 6
    assert len(own.claims) == 5 + 2 * 4


def test_bad_cells_are_found_before_anything_is_trained(data: ImageDataset, tmp_path: Path) -> None:
    training.check(common(tmp_path), SMALL, data)
    large = dataclasses.replace(SMALL, factorial=dataclasses.replace(SMALL.factorial, batch_size=1000))
    with pytest.raises(InputError, match="batch_size is 1000"):
        training.check(common(tmp_path), large, data)


def test_the_dry_run_counts_trials_and_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "cost_of", lambda run, observers: (2.0, run.pooling))
    own: Settings = dataclasses.replace(SMALL, factorial=dataclasses.replace(SMALL.factorial, epochs=2, seeds=5))
    lines, seconds = training.dry_run(common(tmp_path), own)
    assert len(lines) == 6
    assert seconds == pytest.approx(6 * 2.0 * (2 * 1 / 2 + 5))
