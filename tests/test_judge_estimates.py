"""Estimates of comparisons: intervals over seeds and networks on their scales, against scipy, statsmodels and closed forms."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from judge_records import BELOW_GAP, GAP, GCP, ratios, scatter, table
from scipy import special, stats

from secondorder.errors import InputError
from studies.judge import Bound, Comparison, Difference, Equivalence, Estimate, Interaction, Ratio, estimate

LOGS = [-0.3, -0.1, -0.25, -0.05, -0.2]


def measured(compare: Comparison, values: pd.DataFrame) -> Estimate:
    estimated = estimate(compare, values)
    assert estimated is not None
    return estimated


def p_values(estimated: Estimate) -> tuple[float, float]:
    """Of "not below the zone" and of "not above the zone"."""
    mean, (low, high) = estimated.mean, estimated.zone
    return mean.p_value(low - mean.value), mean.p_value(mean.value - high)


def test_ratio_is_students_t_of_paired_logarithms() -> None:
    ratio = measured(BELOW_GAP, ratios(LOGS))
    for confidence, ends in ((0.95, np.log([ratio.low, ratio.high])), (0.90, ratio.mean.interval(0.90))):
        reference = stats.ttest_1samp(LOGS, 0.0).confidence_interval(confidence)
        assert ends == pytest.approx((reference.low, reference.high))
    assert ratio.value == pytest.approx(np.exp(np.mean(LOGS)))
    assert (ratio.n, ratio.networks, ratio.left_out) == (5, 1, 0)
    assert ratio.by_seed.effect.to_numpy() == pytest.approx(np.exp(LOGS))


def test_p_values_are_those_of_the_ends_of_the_zone() -> None:
    below = stats.ttest_1samp(LOGS, math.log(0.9), alternative="less").pvalue
    above = stats.ttest_1samp(LOGS, math.log(1.1), alternative="greater").pvalue
    assert p_values(measured(BELOW_GAP, ratios(LOGS))) == pytest.approx((below, above))


def test_interaction_is_a_difference_of_differences_of_logarithms() -> None:
    steps = {("gcp", "sgd"): [100, 120, 90], ("gcp", "kfac"): [80, 90, 70], ("gap", "sgd"): [200, 210, 190]}
    steps |= {("gap", "kfac"): [100, 120, 80]}
    rows = [("n", seed, *cell, v) for cell, values in steps.items() for seed, v in enumerate(values)]
    values = pd.DataFrame(rows, columns=["network", "seed", "head", "optimizer", "value"])
    interaction = measured(Interaction(GCP, GAP, {"optimizer": "sgd"}, {"optimizer": "kfac"}), values)
    log = {cell: np.log(v) for cell, v in steps.items()}
    effects = log["gcp", "sgd"] - log["gcp", "kfac"] - (log["gap", "sgd"] - log["gap", "kfac"])
    reference = stats.ttest_1samp(effects, 0.0).confidence_interval()
    assert (interaction.low, interaction.high) == pytest.approx((reference.low, reference.high))
    assert p_values(interaction)[0] == pytest.approx(stats.ttest_1samp(effects, -0.1, alternative="less").pvalue)


@pytest.mark.parametrize(
    ("scale", "forward", "inverse"),
    [("identity", lambda x: x, lambda x: x), ("logit", special.logit, special.expit), ("fisher", np.arctanh, np.tanh)],
)
def test_difference_is_told_from_the_mean_of_the_reference(scale: str, forward: Any, inverse: Any) -> None:
    gap, gcp = np.array([0.90, 0.93, 0.96]), np.array([0.99, 0.98, 0.999])
    difference = measured(Difference(GCP, GAP, margin=0.02, scale=scale), table({"gap": list(gap), "gcp": list(gcp)}))
    center, effects = forward(gap).mean(), forward(gcp) - forward(gap)
    reference = stats.ttest_1samp(effects, 0.0).confidence_interval()
    expected = inverse(center + np.array([effects.mean(), reference.low, reference.high])) - inverse(center)
    assert (difference.value, difference.low, difference.high) == pytest.approx(tuple(expected))
    end = forward(inverse(center) + 0.02) - center
    assert p_values(difference)[1] == pytest.approx(stats.ttest_1samp(effects, end, alternative="greater").pvalue)
    if scale != "identity":
        assert (
            inverse(center) + difference.high
            < 1
            < inverse(center) + stats.ttest_1samp(gcp - gap, 0).confidence_interval().high
        )


def test_a_margin_beyond_the_scale_is_never_passed() -> None:
    accurate = Difference(GCP, GAP, "above", margin=0.1, scale="logit")  # from 95 % nothing is 10 points better
    difference = measured(accurate, table({"gap": [0.95, 0.951, 0.949], "gcp": [0.99, 0.9901, 0.9899]}))
    assert difference.value == pytest.approx(0.04, abs=1e-3)
    assert p_values(difference)[1] == 1.0


def test_bound_of_correlations_stays_within_one() -> None:
    r = [0.9, 0.99, 0.5]
    bound = measured(Bound(GCP, "above", 0.0, 0.1, "fisher"), table({"gcp": r}))
    reference = stats.ttest_1samp(np.arctanh(r), 0.0).confidence_interval()
    assert (bound.low, bound.high) == pytest.approx((np.tanh(reference.low), np.tanh(reference.high)))
    assert p_values(bound)[1] == pytest.approx(
        stats.ttest_1samp(np.arctanh(r), np.arctanh(0.1), alternative="greater").pvalue
    )


def several(effects: dict[str, list[float]]) -> pd.DataFrame:
    return pd.concat([ratios(logs, network) for network, logs in effects.items()])


@pytest.mark.parametrize("sd", [0.0, 0.01, 0.1])
def test_networks_with_as_many_seeds_have_the_t_interval_of_their_means(sd: float) -> None:
    means = [-0.5, -0.1, -0.3, -0.25]
    effects = {f"net{i}": list(scatter(mean, sd * (1 + i), 3)) for i, mean in enumerate(means)}
    ratio = measured(BELOW_GAP, several(effects))
    reference = stats.ttest_1samp(means, 0.0).confidence_interval()
    assert np.log([ratio.value, ratio.low, ratio.high]) == pytest.approx(
        [np.mean(means), reference.low, reference.high]
    )
    assert p_values(ratio)[0] == pytest.approx(stats.ttest_1samp(means, math.log(0.9), alternative="less").pvalue)
    assert (ratio.n, ratio.networks) == (3, 4)


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1])
def test_networks_that_agree_by_chance_have_the_error_of_their_seeds(spread: float) -> None:
    """Knapp and Hartung's modification: means closer than their seeds allow do not make the interval narrower."""
    effects = {f"net{i}": list(scatter(-0.2 + spread * i, 0.5, 4)) for i in (-1, 0, 1)}
    ratio = measured(BELOW_GAP, several(effects))
    half = stats.t.ppf(0.975, 2) * 0.5 / math.sqrt(12)
    assert np.log([ratio.value, ratio.low, ratio.high]) == pytest.approx([-0.2, -0.2 - half, -0.2 + half])
    assert ratio.mean.between == 0.0


def test_unequal_networks_are_weighed_as_by_hand() -> None:
    """Paule and Mandel's tau^2 solves sum w_i (y_i - mean)^2 = k - 1; the interval is Hartung and Knapp's."""
    counts, means, sd = np.array([2, 5, 9]), np.array([-0.6, -0.1, -0.3]), 0.2
    effects = {f"net{n}": list(scatter(mean, sd, n)) for n, mean in zip(counts, means, strict=True)}
    ratio = measured(BELOW_GAP, several(effects))
    low, high = 0.0, 1.0
    for _ in range(100):  # bisection
        tau2 = (low + high) / 2
        w = 1 / (tau2 + sd**2 / counts)
        mean = (w * means).sum() / w.sum()
        low, high = (tau2, high) if (w * (means - mean) ** 2).sum() > 2 else (low, tau2)
    error = math.sqrt((w * (means - mean) ** 2).sum() / (2 * w.sum()))
    half = stats.t.ppf(0.975, 2) * error
    assert tau2 > 0.01
    assert np.log([ratio.value, ratio.low, ratio.high]) == pytest.approx([mean, mean - half, mean + half], rel=1e-4)
    assert ratio.n == 2


def test_networks_of_one_seed_each_are_the_sample() -> None:
    ratio = measured(BELOW_GAP, several({f"net{i}": [x] for i, x in enumerate(LOGS)}))
    alone = measured(BELOW_GAP, ratios(LOGS))
    assert (ratio.low, ratio.high, ratio.n, ratio.networks) == pytest.approx((alone.low, alone.high, 1, 5))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_values_without_logarithm_are_left_out_and_counted(bad: float) -> None:
    values = ratios([*LOGS, 3.0, 3.0])
    values.loc[(values.seed == 5) & (values["head"] == "gcp"), "value"] = bad
    ratio = measured(BELOW_GAP, values[(values.seed != 6) | (values["head"] == "gap")])  # seed 6 lacks a head
    assert (ratio.n, ratio.left_out) == (5, 2)
    assert ratio.value == pytest.approx(np.exp(np.mean(LOGS)))


@pytest.mark.parametrize("censored", [9.0, math.inf])
def test_a_censored_value_leaves_no_interval(censored: float) -> None:
    values = ratios(LOGS).assign(censored=False)
    values.loc[3, ["value", "censored"]] = [censored, True]
    ratio = measured(BELOW_GAP, values)
    assert (ratio.low, ratio.high, ratio.censored, ratio.has_interval) == (0.0, math.inf, 1, False)


@pytest.mark.parametrize(
    ("compare", "ends"),
    [
        (BELOW_GAP, (0, math.inf)),
        (Difference(GCP, GAP), (-math.inf, math.inf)),
        (Difference(GCP, GAP, scale="logit"), (-0.5, 0.5)),
        (Bound(GCP, "above", 0.0, scale="fisher"), (-1, 1)),
    ],
)
def test_one_seed_has_no_interval(compare: Comparison, ends: tuple[float, float]) -> None:
    single = measured(compare, table({"gap": [0.5], "gcp": [0.25]}))
    assert (single.low, single.high) == pytest.approx(ends)
    assert not single.has_interval


def test_nothing_measured_is_none() -> None:
    assert estimate(BELOW_GAP, pd.DataFrame()) is None
    assert estimate(BELOW_GAP, table({"gap": [1.0, 2.0]})) is None
    assert estimate(BELOW_GAP, ratios(LOGS).query("(seed < 2) == (head == 'gap')")) is None  # no seed in common
    diverged = measured(BELOW_GAP, table({"gap": [1.0, 2.0, 0.0], "gcp": [math.inf, math.nan, 0.0]}))
    assert (diverged.n, diverged.networks, diverged.left_out, diverged.has_interval) == (0, 0, 3, False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ratios(LOGS).drop(columns="seed"),
            "the values of a claim lack the columns seed; they have network, head, value",
        ),
        (pd.concat([ratios(LOGS)] * 2), "network digits_net, seed 0: more than one value of head gcp"),
        (ratios(LOGS).assign(value="high"), "the values of head gcp must be numbers"),
        ([1.0, 2.0], r"the values of a claim: must be a pandas DataFrame, not \[1.0, 2.0\]"),
    ],
)
def test_bad_values(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        estimate(BELOW_GAP, values)


def test_percentages_are_no_fractions() -> None:
    with pytest.raises(InputError, match="value 97: 'logit' takes values from 0 to 1; divide percentages by 100"):
        estimate(Difference(GCP, GAP, scale="logit"), table({"gap": [0.9, 97.0], "gcp": [0.9, 0.9]}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ratio({"head": "gpc"}, GAP), "unknown head 'gpc'; choose one of: gap,"),
        (lambda: Ratio({"pooling": "gcp"}, GAP), "unknown column in of 'pooling'; choose one of: head,"),
        (lambda: Ratio({}, GAP), "must map columns to values"),
        (lambda: Ratio(GCP, GCP), "of and to are the same cell, head gcp"),
        (
            lambda: Ratio({"head": "gcp", "step": 1}, GAP),
            "of and to must name the same columns, not head, step and head",
        ),
        (lambda: Ratio({"head": ["gcp"]}, GAP), "head .* must be a word or a number"),  # type: ignore[dict-item]
        (lambda: Ratio(GCP, GAP, "beside"), "unknown side claimed 'beside'; choose one of: below, above"),
        (lambda: Ratio(GCP, GAP, margin=1.0), r"margin must be a number in \[0, 1\), got 1.0"),
        (lambda: Difference(GCP, GAP, margin=-0.1), "margin must be a finite number of at least 0, got -0.1"),
        (lambda: Difference(GCP, GAP, margin=math.nan), "margin must be a finite number of at least 0, got nan"),
        (lambda: Difference(GCP, GAP, scale="log"), "unknown scale of a difference 'log'"),
        (lambda: Interaction(GCP, GAP, GAP, GCP), "crosses two factors, and 'head' is a column of both"),
        (lambda: Bound(GCP, "above", math.inf), "reference inf: 'identity' needs a finite number"),
        (
            lambda: Bound(GCP, "above", 2.0, scale="fisher"),
            "reference 2.0: 'fisher' needs a finite number from -1 to 1",
        ),
        (lambda: Equivalence(Ratio(GCP, GAP, margin=0.0)), "margin 0 of an equivalence: must be above 0"),
        (lambda: Equivalence(Equivalence(Ratio(GCP, GAP))), "must be a Ratio, Difference, Interaction or Bound"),
    ],
)
def test_bad_comparisons(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
