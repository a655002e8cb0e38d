"""The costs of K-FAC steps: rows of the measurement, and verdicts on tables whose answer is known."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from secondorder.errors import InputError
from secondorder.untouched import same_randomness
from studies.performance import kfac_section
from studies.performance.kfac_costs import KINDS, METHODS, PERIODS, PLAIN, TARGETS, WHOLE, Case, measure, shares
from studies.performance.study import PRESETS, Settings
from studies.statistics import median_interval

CASE = Case("digits_tiny", "gap", 4)


def rows(ratios: dict[str, float], repeats: int = 9, memory: float = 1.0) -> pd.DataFrame:
    """Steps that take `ratios` SGD steps by kind, whatever else the machine does, and one repeat in which it stalls."""
    return pd.DataFrame(
        CASE.labels
        | {"method": method, "repeat": repeat, "kind": kind, "sgd_ms": 10.0 * busy}
        | {"milliseconds": 10.0 * busy * ratio * (5.0 if repeat == 3 else 1.0)}
        | {"peak_mib": 3.0 * memory, "state_mib": memory, "sgd_peak_mib": 3.5, "sgd_state_mib": 0.5}
        for repeat, busy in zip(range(repeats), itertools.cycle((1.0, 3.0, 2.0)), strict=False)
        for method in METHODS
        for kind, ratio in ratios.items()
    )


def test_a_period_is_made_of_all_its_steps() -> None:
    for factors, inverses in PERIODS:
        kinds = ["factors" if step % factors == 0 else PLAIN for step in range(inverses)]
        kinds[0] = WHOLE
        assert shares(factors, inverses) == pytest.approx({kind: kinds.count(kind) / inverses for kind in KINDS})


def test_targets_are_judged_by_the_interval() -> None:
    fast = {"plain": 1.01, "factors": 1.9, "factors and inverses": 2.4}
    table = kfac_section.summary(rows(fast))
    assert len(table) == len(METHODS) * len(TARGETS)
    assert set(table.reached) == {"yes"}
    found = table[table.method == "EKFAC"].set_index("quantity")
    assert found.estimate["(1, 1)"] == pytest.approx(2.4)
    assert found.estimate["(10, 10)"] == pytest.approx(0.9 * 1.01 + 0.1 * 2.4)
    assert found.estimate["(10, 100)"] == pytest.approx(0.9 * 1.01 + 0.09 * 1.9 + 0.01 * 2.4)
    assert found.estimate["peak memory"] == pytest.approx(1.0)
    slow = {kind: 2 * ratio for kind, ratio in fast.items()}
    assert set(kfac_section.summary(rows(slow, memory=2.0)).reached) == {"no"}
    few = kfac_section.summary(rows(fast, repeats=3))
    assert set(few[few.quantity != "peak memory"].reached) == {"undecided"}


def test_the_caption_names_what_is_missed() -> None:
    steps = rows({"plain": 1.0, "factors": 2.0, "factors and inverses": 4.0})
    table = kfac_section.summary(steps)
    parts = kfac_section.breakdown(
        pd.DataFrame(
            CASE.labels | {"method": method, "repeat": repeat, "part": part, "milliseconds": float(repeat)}
            for method, repeat, part in itertools.product(METHODS, range(3), ("curvature", "update"))
        ),
        steps,
    )
    assert (parts.milliseconds == 1.0).all()
    assert parts.sgd_steps.to_numpy() == pytest.approx(1.0 / steps.sgd_ms.median())
    caption = kfac_section.picture(table, parts).caption
    assert "missed: K-FAC, eigen (1, 1) with gap" in caption
    tables = kfac_section.printed(table, steps)
    assert list(tables[0].data.columns[-2:]) == ["target: below", "reached"]
    assert "plain" in tables[1].data
    assert list(kfac_section.parts_table(parts).data.columns) == ["head", "method", "curvature", "update"]


def test_every_kind_of_step_is_measured_and_its_parts_named() -> None:
    with same_randomness():
        steps, parts = (pd.DataFrame(table) for table in measure(CASE, 2, torch.device("cpu")))
    assert set(kfac_section.COLUMNS) == set(steps)
    assert set(kfac_section.PART_COLUMNS) == set(parts)
    assert len(steps) == 2 * len(METHODS) * len(KINDS)
    assert steps.notna().all().all()
    assert (steps[["milliseconds", "sgd_ms", "peak_mib", "state_mib", "sgd_peak_mib", "sgd_state_mib"]] > 0).all().all()
    assert (steps.state_mib > steps.sgd_state_mib).all()
    names = {"forward and backward", "curvature", "factors", "inverses", "preconditioning", "update"}
    assert names <= set(parts.part)
    assert len(parts) == 2 * len(METHODS) * parts.part.nunique()
    assert (parts.groupby("part").milliseconds.median()[[*names]] > 0).all()


def test_the_median_lies_between_order_statistics() -> None:
    values = np.array([5.0, 1.0, 2.0, 100.0, 3.0, 4.0, 6.0])
    interval = median_interval(values)
    assert (interval.estimate, interval.low, interval.high) == (4.0, 1.0, 100.0)
    assert median_interval(np.arange(9.0)).high == 7.0
    assert np.isinf([median_interval(values[:5]).low, median_interval(values[:5]).high]).all()
    assert np.isnan(median_interval([]).estimate)
    assert np.isnan(median_interval([1.0, np.nan]).estimate)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kfac_backbone": "resnet19"}, "unknown backbone 'resnet19'"),
        ({"kfac_poolings": ("gpa",)}, "unknown pooling 'gpa'"),
        ({"kfac_poolings": ()}, "at least 1 head"),
        ({"kfac_images": 1}, "--kfac-images 1"),
        ({"kfac_repeats": 0}, "--kfac-repeats 0"),
    ],
)
def test_bad_settings(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Settings(**wrong)  # type: ignore[arg-type]


def test_presets_have_enough_repeats_for_an_interval() -> None:
    assert all(settings.kfac_repeats >= 6 for name, settings in PRESETS.items() if name != "smoke")
