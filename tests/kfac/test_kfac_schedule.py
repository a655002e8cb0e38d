"""When factors and inverses are due."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from secondorder.errors import InputError
from secondorder.kfac import KFAC, Options
from secondorder.kfac.schedule import SMALL_NETWORK, WARM_UP_SHARE, Intervals, spread


def simulated(intervals: Intervals, steps: int) -> tuple[list[int], dict[str, list[int]]]:
    factors: list[int] = []
    inverses: dict[str, list[int]] = {name: [] for name in intervals.turns}
    for step in range(steps):
        intervals.step = step
        if intervals.factors_due:
            factors.append(step)
            intervals.last_factors = step
        for name in intervals.inverses_due():
            inverses[name].append(step)
            intervals.last_inverse[name] = step
    return factors, inverses


def test_plain_intervals() -> None:
    factors, inverses = simulated(Intervals(3, 6, warm_up=False, stagger=False, costs={"a": 1, "b": 1}), 20)
    assert factors == [0, 3, 6, 9, 12, 15, 18]
    assert inverses == {"a": [0, 6, 12, 18], "b": [0, 6, 12, 18]}


def test_staggered_layers_take_turns() -> None:
    names = {f"layer{i}": float(1 + i % 3) for i in range(20)}
    factors, inverses = simulated(Intervals(10, 10, warm_up=False, stagger=True, costs=names), 100)
    assert factors == list(range(0, 100, 10))
    for steps in inverses.values():
        assert steps[0] == 0
        assert {b - a for a, b in pairwise(steps[1:])} == {10}
        assert 10 <= steps[1] < 20  # at a turn after the second update of the factors
    assert max(sum(names[name] for name in names if step in inverses[name]) for step in range(1, 100)) <= 5


def test_warm_up_is_dense_at_first_and_then_gives_way_to_the_intervals() -> None:
    factors, inverses = simulated(Intervals(10, 100, warm_up=True, stagger=True, costs={"a": 1, "b": 2}), 1000)
    assert factors[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 18]
    assert {b - a for a, b in pairwise(factors[-20:])} == {10}
    for steps in inverses.values():
        gaps = [b - a for a, b in pairwise(steps)]
        assert max(gaps[:-3]) <= 200
        assert gaps[-3:] == [100] * 3
        assert len(steps) < 60


def test_no_inversion_without_new_factors() -> None:
    _, inverses = simulated(Intervals(10, 1, warm_up=False, stagger=True, costs={"a": 1}), 40)
    assert inverses["a"] == [0, 10, 20, 30]


def test_counters_are_restored() -> None:
    costs = {"a": 1.0, "b": 3.0}
    whole = Intervals(4, 6, warm_up=True, stagger=True, costs=costs)
    first = Intervals(4, 6, warm_up=True, stagger=True, costs=costs)
    simulated(first, 11)
    second = Intervals(4, 6, warm_up=True, stagger=True, costs=costs)
    second.load_state_dict(first.state_dict())
    simulated(whole, 11)
    for step in range(11, 60):
        whole.step = second.step = step
        assert whole.factors_due == second.factors_due
        for one in (whole, second):
            if one.factors_due:
                one.last_factors = step
        assert whole.inverses_due() == second.inverses_due()
        for one in (whole, second):
            one.last_inverse |= dict.fromkeys(one.inverses_due(), step)


def paced(costs: dict[str, float], work: float) -> Intervals:
    intervals = Intervals(10, 10, warm_up=True, stagger=True, costs=costs)
    intervals.pace(costs, work)
    return intervals


def test_small_networks_do_not_wait_in_warm_up() -> None:
    costs = {f"layer{i}": SMALL_NETWORK / 8 for i in range(8)}
    assert simulated(paced(costs, 1.0), 100) == simulated(Intervals(10, 10, True, True, costs), 100)


@pytest.mark.parametrize("steps", [10, 40])
def test_renewals_in_the_warm_up_of_large_networks_are_a_part_of_the_passes_work(steps: int) -> None:
    costs = {f"layer{i}": SMALL_NETWORK * (1 + i % 7) ** 3 for i in range(30)}
    work = sum(costs.values()) / 2  # an inversion of all layers takes as long as two steps
    _, inverses = simulated(paced(costs, work), steps)
    spent = sum(costs[name] * (len(found) - 1) for name, found in inverses.items())  # the first one is needed
    assert 0.3 * WARM_UP_SHARE * steps * work < spent <= WARM_UP_SHARE * steps * work
    renewals = {name: len(found) for name, found in inverses.items()}
    assert renewals["layer0"] > renewals["layer6"]


def test_very_large_networks_take_turns_from_the_beginning() -> None:
    costs = {f"layer{i}": SMALL_NETWORK for i in range(30)}
    _, inverses = simulated(paced(costs, 1e-3 * SMALL_NETWORK), 100)
    for found in inverses.values():
        assert found[0] == 0
        assert len(found) <= 11
    for step in range(1, 100):
        assert sum(step in found for found in inverses.values()) <= 3


def test_the_largest_batch_so_far_sets_the_pace() -> None:
    costs = {"a": SMALL_NETWORK, "b": SMALL_NETWORK}
    one = paced(costs, 1e12)
    gaps = dict(one.gaps)
    one.pace(costs, 1e11)
    assert one.gaps == gaps
    other = Intervals(10, 10, True, True, costs)
    other.load_state_dict(one.state_dict())
    other.pace(costs, 0.0)
    assert other.gaps == gaps


def test_spread_balances() -> None:
    turns = spread({"big": 10, "a": 5, "b": 5, "c": 1}, 2)
    assert turns["a"] == turns["b"] != turns["big"]


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "10"])
@pytest.mark.parametrize("name", ["factor_interval", "inverse_interval"])
def test_bad_intervals(name: str, value: object) -> None:
    values = {"factor_interval": 1, "inverse_interval": 1} | {name: value}
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1, got {value!r}"):
        Intervals(**values, warm_up=False, stagger=False, costs={})


def test_a_network_is_paced_by_the_operations_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secondorder.kfac.schedule.SMALL_NETWORK", 0.0)
    model, optimizer = None, None
    for resumed in (False, True):
        state = optimizer.state_dict() if resumed else None
        torch.manual_seed(0)
        model = model if resumed else nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(48, 5))
        optimizer = KFAC(model, options=Options(wide_inputs=40))
        if state is not None:
            optimizer.load_state_dict(state)
        intervals = optimizer.preconditioner.intervals
        if not resumed:
            x, y = torch.randn(6, 2, 5, 5), torch.arange(6) % 5
            logits = model(x)
            optimizer.update_curvature(logits)
            nn.functional.cross_entropy(logits, y).backward()
            optimizer.step()
        assert intervals.work == 6 * 6 * (16 * 3 * 9 + 5 * 49)  # 16 positions of the convolution
        costs = {"0": 16 * (9**3 + 3**3), "2": 32 * 6**3 + 8 * 6**2 * 49 + 16 * 5**3}  # 6 rows of 49 inputs
        roots = {name: cost**0.5 for name, cost in costs.items()}
        expected = {name: root * sum(roots.values()) / (WARM_UP_SHARE * intervals.work) for name, root in roots.items()}
        assert intervals.gaps == pytest.approx(expected)


def test_an_interval_that_is_never_over_takes_no_time() -> None:
    assert spread({"a": 1.0, "b": 2.0}, 10**12) == {"a": 1, "b": 0}
    KFAC(nn.Linear(3, 2), inverse_interval=10**12)
