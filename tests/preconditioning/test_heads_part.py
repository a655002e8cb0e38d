"""Part A of the preconditioning study: what is measured of a backbone, and the verdicts drawn from tables of both outcomes."""

import dataclasses

import pandas as pd
import pytest
import torch
from torch import nn

from secondorder.data import ImageDataset, load_dataset
from secondorder.networks import Network, network
from secondorder.preconditioning import head_spectrum
from studies.preconditioning.heads.measure import heads, measure
from studies.preconditioning.heads.section import part
from studies.preconditioning.settings import PRESETS
from studies.preconditioning.situation import Row, Situation

SMOKE = dataclasses.replace(PRESETS["smoke"], backbone="digits_tiny")
MEANS = {"exact root": 1.3, "covariance": 30.0, "logarithm": 20.0, "power 1/4": 5.0, "power 3/4": 5.0, "5 steps": 6.0}
HEADS = {"exact root": ("gcp_exact", ""), "covariance": ("covariance", ""), "logarithm": ("gcp_log", "")}
HEADS |= {"power 1/4": ("gcp_power", "0.25"), "power 3/4": ("gcp_power", "0.75"), "5 steps": ("gcp", "5")}


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("digits", limit=256)


@pytest.fixture(scope="module")
def rows(data: ImageDataset) -> list[Row]:
    torch.manual_seed(0)
    return measure(Situation(network("digits_tiny", "gcp", 10, 1), data, SMOKE, 0))


def found(rows: list[Row], head: str, measure: str, setting: str = "") -> float:
    (value,) = (r["value"] for r in rows if (r["head"], r["measure"], r["setting"]) == (head, measure, setting))
    assert isinstance(value, float)
    return value


def table_of(medians: dict[str, float], seeds: int = 3, moments: tuple[float, ...] = (0.0, 1.0)) -> pd.DataFrame:
    """A table with these median condition numbers, differing a little between seeds."""
    rows = []
    for seed in range(seeds):
        for backbone, moment in [("untrained", 0.0), *((b, m) for b in ("gap", "gcp") for m in moments[1:])]:
            keys = {"backbone": backbone, "seed": seed, "step": int(100 * moment), "moment": moment, "part": "heads"}
            for name, median in medians.items():
                head, setting = HEADS[name]
                values = {"condition_median": median * (1 + 0.01 * seed), "condition_q25": median / 1.1}
                values |= {
                    "condition_q75": median * 1.1,
                    "condition_max": median * 1.05,
                    "smallest": 1.0,
                    "largest": 2.0,
                }
                values |= {"closed_condition": median, "jacobian_condition": median, "jacobian_error": 1e-15}
                values |= {"trace_gap": 0.1} if head == "gcp" else {}
                rows += [keys | {"head": head, "setting": setting, "measure": m, "value": v} for m, v in values.items()]
            spectrum = [
                ("1", "share_median", 0.7),
                ("1", "share_q25", 0.6),
                ("1", "share_q75", 0.8),
                ("", "kappa_median", 9.0),
            ]
            rows += [keys | {"head": "features", "setting": s, "measure": m, "value": v} for s, m, v in spectrum]
    return pd.DataFrame(rows).assign(layer="", batch=-1)


def verdicts(table: pd.DataFrame) -> list[str]:
    return [claim.verdict for claim in part(table).claims]


def test_every_head_is_measured_on_the_features_that_it_reads(data: ImageDataset, rows: list[Row]) -> None:
    torch.manual_seed(0)
    situation = Situation(network("digits_tiny", "gcp", 10, 1), data, SMOKE, 0)
    images, _ = situation.some_images(8)
    with torch.no_grad():
        features = situation.frozen.features(situation.frozen.stem(images))
    assert features.shape == (8, 6, 8, 8)
    for head, options in heads(SMOKE):
        spectrum = head_spectrum(features, head, **options)
        setting = "".join(str(value) for value in options.values())
        assert found(rows, head, "condition_median", setting) == pytest.approx(float(spectrum.condition.quantile(0.5)))
        assert found(rows, head, "condition_max", setting) == pytest.approx(float(spectrum.condition.max()))
        assert found(rows, head, "smallest", setting) == pytest.approx(8 * float(spectrum.smallest.min()))
        assert found(rows, head, "largest", setting) == pytest.approx(8 * float(spectrum.largest.max()))
        assert found(rows, head, "jacobian_error", setting) < 1e-12
    gap = head_spectrum(features[::4], "gcp").singular_values
    gap = 8 * (gap - head_spectrum(features[::4], "gcp", trace_term=False).singular_values).abs().max()
    assert found(rows, "gcp", "trace_gap", "5") == pytest.approx(float(gap))
    assert found(rows, "features", "rank_median") == 6
    shares = sum(found(rows, "features", "share_median", str(rank)) for rank in range(1, 7))
    assert shares == pytest.approx(1, abs=0.1)
    assert all(r["part"] == "heads" and torch.tensor(r["value"]).isfinite() for r in rows)


def test_images_with_constant_features_are_left_out(data: ImageDataset, rows: list[Row]) -> None:
    class Blind(nn.Module):
        """Zeros for the first two images."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (torch.arange(len(x)) >= min(2, len(x) - 1)).to(x)[:, None, None, None]

    torch.manual_seed(0)
    model = network("digits_tiny", "gcp", 10, 1)
    blind = Network(model.stem, nn.Sequential(model.features, Blind()), model.head, model.classifier)
    fewer = measure(Situation(blind, data, SMOKE, 0))
    assert len(fewer) == len(rows)
    assert all(torch.tensor(r["value"]).isfinite() for r in fewer)
    nothing = Network(
        model.stem, nn.Sequential(model.features, nn.Threshold(torch.inf, 1.0)), model.head, model.classifier
    )
    assert measure(Situation(nothing, data, SMOKE, 0)) == []


def test_a_backbone_in_single_precision_is_measured_in_double(data: ImageDataset, rows: list[Row]) -> None:
    torch.manual_seed(0)
    single = dataclasses.replace(SMOKE, precision="float32")
    other = measure(Situation(network("digits_tiny", "gcp", 10, 1), data, single, 0))
    for a, b in zip(rows, other, strict=True):
        assert b["measure"].endswith("error") or b["value"] == pytest.approx(a["value"], rel=1e-3)  # type: ignore[attr-defined]


def test_verdicts_follow_the_numbers() -> None:
    assert verdicts(table_of(MEANS)) == ["supported"] * 2 + ["not supported"] * 3 + ["supported"] * 2
    better = MEANS | {"5 steps": 1.5}
    assert verdicts(table_of(better)) == ["supported"] * 7
    worse = MEANS | {"exact root": 9.0, "5 steps": 60.0}
    assert verdicts(table_of(worse)) == ["not supported", "supported", *["not supported"] * 5]
    claims = part(table_of(MEANS)).claims
    assert len({claim.meaning for claim in claims}) == len(claims)
    assert {claim.group for claim in claims} == {"A: head conditioning"}
    assert claims[5].interval.estimate == pytest.approx(5 / 1.3)
    assert claims[6].interval.estimate == pytest.approx(0.2)


@pytest.mark.parametrize("backbone", ["untrained", "gap", "gcp"])
def test_one_backbone_is_enough_to_contradict_a_claim_about_all(backbone: str) -> None:
    table = table_of(MEANS)
    own = (table.backbone == backbone) & (table["head"] == "covariance") & (table.measure == "condition_median")
    table.loc[own, "value"] = 1.1  # better than the root with 1.3, and than 5 steps with 6
    assert verdicts(table)[5:] == ["not supported"] * 2


def test_the_closed_form_is_doubted_when_autograd_says_otherwise() -> None:
    table = table_of(MEANS)
    table.loc[(table["head"] == "gcp_log") & (table.measure == "jacobian_error"), "value"] = 1e-3
    assert verdicts(table)[1] == "not supported"
    assert "in doubt" in part(table).claims[1].meaning


def test_identical_seeds_one_seed_and_few_settings() -> None:
    table = table_of(MEANS)
    same = table.assign(value=table.value.where(table.seed == 0, table.value / (1 + 0.01 * table.seed)))
    assert verdicts(same)[0] == "supported"
    one = part(table[table.seed == 0])
    assert {claim.verdict for claim in one.claims} == {"undecided"}
    assert "no interval" in str(one.claims[0].interval)
    untrained = part(table[table.backbone == "untrained"])
    assert len(untrained.claims) == 5
    assert len(part(table[table["head"] != "gcp"]).claims) == 3
    assert part(table[:0]).claims == []
    assert len(part(table[:0]).remarks) == 1


def test_figure_and_table_from_measured_rows(rows: list[Row]) -> None:
    keys = [("untrained", 0, 0.0), ("gap", 10, 1.0), ("gcp", 10, 1.0)]
    table = pd.DataFrame([
        {"backbone": b, "seed": seed, "step": step, "moment": moment, **r}
        for seed in range(2)
        for b, step, moment in keys
        for r in rows
    ])  # fmt: skip
    shown = part(table)
    (picture,), (summary,) = shown.pictures, shown.tables
    titles = [axes.get_title() for axes in picture.figure.axes]
    assert len(titles) == 4
    assert "within √2" in picture.caption
    assert list(summary.data["head"]) == [
        "covariance",
        "exact root",
        "logarithm",
        "power 1/4",
        "power 3/4",
        "1 step",
        "5 steps",
    ]
    assert not summary.data.isna().any().any()
    assert summary.data.set_index("head").loc["exact root", "worst condition"] <= 2**0.5 + 1e-9
    picture.figure.draw_without_rendering()
