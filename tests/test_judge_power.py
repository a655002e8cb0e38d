"""Seeds that would decide a claim, against statsmodels, an exact integral and the plan for CIFAR-10."""

import math

import numpy as np
import pytest
from scipy import integrate, stats
from statsmodels.stats.power import TTestPower

from studies.judge.power import seeds_needed

TEN_PERCENT = (math.log(0.9), math.log(1.1))
SD = 0.121  # of the log ratio of the relative gradient distance between seeds, ResNet-8 on CIFAR-10


@pytest.mark.parametrize(
    ("effect", "sd", "zone", "level", "seeds"),
    [
        (math.log(0.854), SD, (0.0, 0.0), 0.025, 7),  # as seen, different from none
        (math.log(1.1), SD, (0.0, 0.0), 0.025, 15),  # an effect of 10 %, different from none
        (0.0, SD, (-math.log(1.1), math.log(1.1)), 0.025, 16),  # none, equivalent within 10 %
        (0.0, SD, TEN_PERCENT, 0.025, 15),  # the same in the zone of a Ratio, 0.9 to 1.1
        (math.log(0.854), SD, TEN_PERCENT, 0.025, 44),  # as seen, beyond the margin of 10 %
        (-0.2, 0.119, (0.0, 0.0), 0.025 / 11, 9),  # the interaction, corrected for 11 claims
        (0.0, 0.119, (-0.1, 0.1), 0.025, 14),
    ],
)
def test_the_plan_for_cifar(effect: float, sd: float, zone: tuple[float, float], level: float, seeds: int) -> None:
    assert seeds_needed(effect, sd, zone, level=level) == seeds


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize(
    ("effect", "level"), [(0.3, 0.025), (0.6, 0.025), (0.6, 0.025 / 9), (1.5, 0.025), (8.0, 0.025)]
)
def test_seeds_beyond_the_margin_are_those_of_statsmodels(side: int, effect: float, level: float) -> None:
    n = seeds_needed(side * (effect + 0.1), 1.0, (-0.1, 0.1), level=level)
    assert n is not None
    power = [TTestPower().power(effect, seeds, level, alternative="larger") for seeds in (max(n - 1, 2), n)]
    assert power[1] >= 0.8
    assert n == 2 or power[0] < 0.8


def inside(effect: float, sd: float, end: float, n: int) -> float:
    """P(both one-sided tests of -end < effect < end at 5 % succeed), an integral over the standard deviation that is seen."""
    error, t, freedom = sd / math.sqrt(n), stats.t.isf(0.05, n - 1), n - 1

    def both(u: float) -> float:
        return max(
            0.0, stats.norm.cdf((end - effect) / error - t * u) - stats.norm.cdf((-end - effect) / error + t * u)
        )

    return integrate.quad(
        lambda u: both(u) * stats.chi.pdf(u * math.sqrt(freedom), freedom) * math.sqrt(freedom), 0, 8
    )[0]


@pytest.mark.parametrize(("effect", "sd", "end"), [(0.0, 0.119, 0.1), (0.05, 0.1, 0.1), (-0.02, 0.2, 0.15)])
def test_seeds_inside_the_margin_have_the_power(effect: float, sd: float, end: float) -> None:
    n = seeds_needed(effect, sd, (-end, end))
    assert n is not None
    assert inside(effect, sd, end, n - 1) < 0.8 <= inside(effect, sd, end, n) + 1e-6


def test_more_seeds_do_not_make_up_for_few_networks() -> None:
    zone = (-0.1, 0.1)
    assert seeds_needed(-0.5, 0.4, zone, networks=3, between=0.2**2) is None
    many = seeds_needed(-0.5, 0.4, zone, networks=6, between=0.2**2)
    assert many is not None
    for seeds, enough in ((many, True), (many - 1, False)):
        ncp = 0.4 / math.sqrt((0.2**2 + 0.4**2 / seeds) / 6)
        assert (stats.nct.sf(stats.t.isf(0.025, 5), 5, ncp) >= 0.8) == enough


@pytest.mark.parametrize(
    ("effect", "sd", "zone"),
    [
        (0.1, 0.3, (-0.1, 0.1)),  # on the edge
        (0.0, 0.3, (0.0, 0.0)),
        (math.nan, 0.3, (-0.1, 0.1)),
        (-0.5, math.nan, (-0.1, 0.1)),  # one seed
        (0.001, 1.0, (-0.01, 0.01)),  # beyond 1,000
    ],
)
def test_no_number_of_seeds(effect: float, sd: float, zone: tuple[float, float]) -> None:
    assert seeds_needed(effect, sd, zone) is None


@pytest.mark.parametrize("sd", [0.0, 1e-300])
def test_without_scatter_two_seeds_decide(sd: float) -> None:
    assert seeds_needed(-0.5, sd, (-0.1, np.inf)) == 2
    assert seeds_needed(-0.5, sd, (-np.inf, 0.1)) == 2
