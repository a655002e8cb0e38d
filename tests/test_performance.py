"""The performance study: what is timed, on what floor, and its pages from made-up records whose answer is known."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from secondorder.errors import InputError
from studies.engine.records import frame
from studies.page import Provenance
from studies.performance import page
from studies.performance.curvature_costs import QUANTITIES, actions, cost_network, measure_curvature, work
from studies.performance.heads import BOUND, TEXTBOOK, VARIANTS, measure_heads, textbook
from studies.performance.kfac_costs import KINDS, METHODS, PERIODS, PLAIN, TARGETS, WHOLE, measure_kfac, shares, target
from studies.performance.study import STUDY, Settings
from studies.statistics import median_interval

CASE = {"network": "digits_tiny", "head": "gap", "images": 4, "repeats": 2, "device": "cpu"}


def steps(ratios: dict[str, float], repeats: int = 9, memory: float = 1.0) -> list[dict[str, Any]]:
    """Steps that take `ratios` SGD steps by kind, whatever else the machine does, and one repeat in which it stalls."""
    rows: list[dict[str, Any]] = []
    for method in ("sgd", *METHODS):
        size = 1.0 if method == "sgd" else memory
        rows += [
            {"optimizer": method, "quantity": q, "value": v * size} for q, v in (("peak MiB", 3.0), ("state MiB", 1.0))
        ]
    for repeat, busy in zip(range(repeats), itertools.cycle((1.0, 3.0, 2.0)), strict=False):
        for method, (kind, ratio) in itertools.product(METHODS, ratios.items()):
            at = {"optimizer": method, "layer": kind, "index": repeat}
            own = 10.0 * busy * ratio * (5.0 if repeat == 3 else 1.0)
            rows += [at | {"quantity": "milliseconds", "value": own}]
            rows += [at | {"quantity": "milliseconds of SGD", "value": 10.0 * busy}]
            rows += [at | {"layer": "update", "quantity": "milliseconds of a part", "value": 1.0}] * (kind == WHOLE)
    return rows


def as_records(rows: list[dict[str, Any]], **labels: Any) -> pd.DataFrame:
    return frame("performance", rows, {"dataset": "random"} | labels, "fake")


FAST = {"plain": 1.01, "factors": 1.5, "factors and inverses": 2.0}


def test_a_period_is_made_of_all_its_steps() -> None:
    for factors, inverses in PERIODS:
        kinds = ["factors" if step % factors == 0 else PLAIN for step in range(inverses)]
        kinds[0] = WHOLE
        assert shares(factors, inverses) == pytest.approx({kind: kinds.count(kind) / inverses for kind in KINDS})


def test_costs_of_steps_are_ratios_to_the_steps_next_to_them() -> None:
    records = as_records(steps(FAST), network="n", head="gap")
    costs = page.kfac_costs(records[records.optimizer.isin(("EKFAC", "sgd"))])
    assert costs.keys() == TARGETS["cifar_resnet20"].keys()
    assert costs["(1, 1)"].estimate == pytest.approx(2.0)
    assert costs["(10, 10)"].estimate == pytest.approx(0.9 * 1.01 + 0.1 * 2.0)
    assert costs["(10, 100)"].estimate == pytest.approx(0.9 * 1.01 + 0.09 * 1.5 + 0.01 * 2.0)
    assert costs["peak memory"].estimate == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("slower", "memory", "repeats", "reached"),
    [(1.0, 1.0, 9, {"yes"}), (2.0, 2.0, 9, {"no"}), (1.0, 1.0, 3, {"undecided", "yes"})],
)
def test_targets_are_judged_by_the_interval(slower: float, memory: float, repeats: int, reached: set[str]) -> None:
    rows = steps({kind: slower * ratio for kind, ratio in FAST.items()}, repeats, memory)
    fold = page.kfac(as_records(rows, network="cifar_resnet20, batch 128", head="gap"), origin())
    assert set(fold.tables[0].data.reached) == reached
    assert ("missed" in fold.pictures[0].caption) == ("no" in reached)
    assert list(fold.tables[1].data.columns) == ["head", "optimizer", "update"]


def test_targets_are_those_of_the_network() -> None:
    assert target("cifar_resnet20", "EKFAC", "(10, 10)") == 1.2
    assert target("cifar_resnet20", "K-FAC, natural", "(10, 10)") == 1.12
    assert target("digits_tiny", "EKFAC", "(10, 10)") == 1.25
    tiny, other = (page.kfac(as_records(steps(FAST), network=n, head="gap"), origin()) for n in ("digits_tiny", "n"))
    assert list(tiny.tables[0].data.reached.unique()) == ["", "yes"]
    assert list(other.tables[0].data.reached.unique()) == [""]
    assert other.pictures[0].caption.startswith("No targets were set for this network.")


def test_every_kind_of_step_is_measured_and_its_parts_named() -> None:
    rows = pd.DataFrame(measure_kfac(CASE | {"repeats": 1}))
    counts = rows.groupby("quantity").size()
    assert counts["milliseconds"] == counts["milliseconds of SGD"] == len(METHODS) * len(KINDS)
    assert counts["peak MiB"] == counts["state MiB"] == 1 + len(METHODS)
    state = rows[rows.quantity == "state MiB"].set_index("optimizer").value
    assert (state[[*METHODS]] > state["sgd"]).all()
    parts = {"forward and backward", "curvature", "factors", "inverses", "preconditioning", "update"}
    assert parts <= set(rows[rows.quantity == "milliseconds of a part"].layer)
    assert (rows[rows.quantity == "milliseconds"].value > 0).all()


def test_every_variant_of_the_head_is_measured() -> None:
    rows = pd.DataFrame(measure_heads({"shape": "2x4x3x3", "repeats": 3, "device": "cpu"}))
    assert set(rows.layer) == {BOUND, *VARIANTS}
    assert (rows[rows.quantity == "milliseconds"].groupby("layer").size() == 3).all()


def test_the_baseline_is_five_textbook_steps() -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    S = torch.stack([torch.cov(sample.flatten(1), correction=0) for sample in x])
    trace = S.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    y, z = S / trace, torch.eye(6, dtype=x.dtype)
    for _ in range(5):
        y, z = 0.5 * y @ (3 * torch.eye(6) - z @ y), 0.5 * (3 * torch.eye(6) - z @ y) @ z
    row, column = torch.triu_indices(6, 6)
    torch.testing.assert_close(textbook(x), (y * trace.sqrt())[:, row, column])


def test_work_is_counted_by_formula() -> None:
    model = cost_network(4)
    images = torch.randn(3, 3, 32, 32)
    necessary = work(model, images)
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    positions = [3 * 32 * 32, 3 * 32 * 32, 3 * 16 * 16, 3 * 16 * 16]
    products = [n * layer.weight.numel() for n, layer in zip(positions, convolutions, strict=True)]
    products.append(3 * model[-1].weight.numel())
    assert necessary.forward == sum(products)
    assert necessary.first == products[0]
    for quantity, (forward, first, factors, activations, _) in QUANTITIES.items():
        operations, moved = necessary.of(quantity)
        multiply_adds = forward * necessary.forward - first * necessary.first + factors * necessary.factors
        assert operations == 2 * multiply_adds
        assert moved == activations * necessary.activations


def test_curvature_costs_are_ratios_within_a_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.performance.curvature_costs.PRODUCT_SIZE", 8)
    monkeypatch.setattr("studies.performance.curvature_costs.COPY_BYTES", 64)
    rows = pd.DataFrame(measure_curvature({"images": 2, "channels": 2, "repeats": 2, "device": "cpu"}))
    timed = rows[rows.quantity == "milliseconds"]
    assert set(timed.layer) == {*QUANTITIES, "matrix product", "copy"}
    # a machine that is busy in every other repeat changes no ratio
    busy = timed["index"].map({0: 1.0, 1: 7.0})
    pace = timed.layer.map({name: 1.0 + number for number, name in enumerate(QUANTITIES)}).fillna(1.0)
    rows.loc[timed.index, "value"] = busy * pace
    fold = page.curvature(as_records(rows.to_dict("records"), network="3-c-c", head="gcp"), origin())
    table = fold.tables[0].data
    assert table["times forward + backward"].tolist() == pytest.approx([1.0 + n for n in range(len(QUANTITIES))])
    assert "Above its target" in fold.pictures[0].caption


def test_quantities_that_are_timed_are_those_with_a_floor() -> None:
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    assert actions(images, labels, channels=2).keys() == QUANTITIES.keys()


def test_speed_up_and_folds() -> None:
    times = {BOUND: 1.0, TEXTBOOK: 8.0, "gcp": 2.0, "gcp, products": 4.0, "gcp_exact": 16.0, "covariance": 1.0}
    rows: list[dict[str, Any]] = [
        {"layer": name, "quantity": "peak MiB", "value": 2 * ms} for name, ms in times.items()
    ]
    rows += [
        {"layer": name, "quantity": "milliseconds", "index": repeat, "value": ms * busy}
        for name, ms in times.items()
        for repeat, busy in enumerate((1.0, 5.0, 2.0, 1.0, 3.0, 1.0))
    ]
    records = as_records(rows, network="features 2x4x3x3")
    fold = page.heads(records, origin())
    gcp = fold.tables[0].data.set_index("variant").loc["gcp"]
    assert (gcp["speed-up"], gcp["times the bound"], gcp["memory / textbook"]) == (4.0, 2.0, 0.25)
    assert "4.0 times at 2x4x3x3" in fold.pictures[0].caption
    assert fold.page == "performance"


def origin() -> Any:
    return Provenance("performance", "Measured here.")


def test_the_median_lies_between_order_statistics() -> None:
    values = np.array([5.0, 1.0, 2.0, 100.0, 3.0, 4.0, 6.0])
    interval = median_interval(values)
    assert (interval.estimate, interval.low, interval.high) == (4.0, 1.0, 100.0)
    assert np.isinf([median_interval(values[:5]).low, median_interval(values[:5]).high]).all()
    assert np.isnan(median_interval([1.0, np.nan]).estimate)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kfac_network": "resnet19"}, "unknown network 'resnet19'"),
        ({"kfac_heads": ("gpa",)}, "unknown pooling 'gpa'"),
        ({"kfac_heads": ()}, "--kfac-heads"),
        ({"kfac_images": 1}, "--kfac-images 1"),
        ({"kfac_repeats": 0}, "--kfac-repeats 0"),
        ({"shapes": ("3x3",)}, "shape '3x3'"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Settings(**wrong)


def test_presets_have_enough_repeats_for_an_interval() -> None:
    assert all(settings.kfac_repeats >= 6 for name, settings in STUDY.presets.items() if name != "smoke")
