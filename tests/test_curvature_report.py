"""From the curvature study's tables to verdicts, figures and tables, on tables whose answer is known."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from studies.curvature import comparisons
from studies.curvature import section as section_of
from studies.curvature.settings import Scale, Settings
from studies.performance import curvature_section
from studies.performance.curvature_costs import QUANTITIES as COSTS
from studies.performance.curvature_costs import cost_network, work
from studies.report import write_report
from studies.results import provenance, write_table
from studies.study import STUDIES

BLOCKS = ("first", "middle", "last", "classifier")
MEASURES = {(q.matrix, q.measure) for q in (*comparisons.QUANTITIES.values(), comparisons.DIFFERENCE)}


def table_with_ratio(ratio: float, poolings: tuple[str, ...] = ("gap", "covariance", "gcp")) -> pd.DataFrame:
    """Every measure of GCP is `ratio` times that of the others, up to a small spread over seeds."""
    rows = []
    for pooling, seed, phase, block, (matrix, measure) in itertools.product(
        poolings, (0, 1, 2), ("initial", "trained", "shared: gap"), BLOCKS, sorted(MEASURES)
    ):
        size = (ratio if pooling == "gcp" else 1.0) * (1.0 + 0.01 * seed * (pooling == "gcp"))
        rows.append({
            "backbone": "digits_tiny", "pooling": pooling, "seed": seed, "phase": phase, "step": 10 * (phase != "initial"),
            "block": block, "matrix": matrix, "measure": measure, "value": 0.3 * size, "error": 0.0,
        })  # fmt: skip
    return pd.DataFrame(rows)


def write_curvature(folder: Path, table: pd.DataFrame) -> None:
    heads = tuple(table.pooling.unique())
    settings = Settings(poolings=heads, small=Scale(share=()), large=Scale(share=()))
    config = dataclasses.asdict(settings) | {"preset": "quick"}
    origin = provenance("curvature", config, [0, 1, 2], {"label": "Digits (8x8)"}, torch.device("cpu"), 1.0)
    write_table(folder, "curvature", table, origin)
    keys = ["backbone", "pooling", "seed", "phase", "step"]
    spectra = (
        table[keys].drop_duplicates().merge(pd.DataFrame({"rank": [1, 2, 5], "value": [1.0, 0.5, 0.01]}), how="cross")
    )
    write_table(folder, "curvature_spectra", spectra.assign(block="last", matrix="GGN"))
    epochs = table[["backbone", "pooling", "seed"]].drop_duplicates().assign(epoch=2, test_top1=0.75)
    write_table(folder, "curvature_training", epochs)


@pytest.mark.parametrize(("ratio", "word"), [(0.5, "supported"), (2.0, "not supported"), (0.99, "undecided")])
def test_verdicts_follow_the_numbers(tmp_path: Path, ratio: float, word: str) -> None:
    write_curvature(tmp_path, table_with_ratio(ratio))
    section = section_of.section(tmp_path)
    ratios = [claim for claim in section.claims if claim.reference == 1.0]
    assert len(ratios) == 3 * 2 + 2 * 4  # two conditions in three phases; two eigenvalues, K-FAC and control in two
    assert {claim.verdict for claim in ratios} == {word}
    for claim in ratios:
        assert claim.interval.estimate == pytest.approx(ratio, rel=0.02)
    differences = [claim for claim in section.claims if claim.reference == 0.5]
    assert [claim.verdict for claim in differences] == ["supported" if ratio == 2.0 else "not supported"] * 2
    assert any(f"{6 if word == 'supported' else 0} supported" in remark for remark in section.remarks)


def test_a_comparison_is_a_geometric_mean_over_blocks() -> None:
    table = table_with_ratio(1.0, ("gap", "gcp"))
    gcp = table.pooling == "gcp"
    for block, factor in zip(BLOCKS, (1.0, 8.0, 27.0, 1000.0), strict=True):
        table.loc[gcp & (table.block == block), "value"] = 0.3 * factor
    found = comparisons.compare(table, "digits_tiny", "trained", "half_rank_condition")
    assert found is not None
    assert found.interval.estimate == pytest.approx(6.0)  # the classifier is not among the convolutions
    last = comparisons.compare(table, "digits_tiny", "trained", "kfac")
    assert last is not None
    assert last.interval.estimate == pytest.approx(27.0)


@pytest.mark.parametrize("value", [0.0, np.nan, -1.0, np.inf])
def test_a_value_without_logarithm_leaves_the_comparison_undecided(tmp_path: Path, value: float) -> None:
    table = table_with_ratio(0.5)
    table.loc[(table.pooling == "gcp") & (table.seed == 1) & (table.block == "middle"), "value"] = value
    write_curvature(tmp_path, table)
    claims = [claim for claim in section_of.section(tmp_path).claims if claim.group == "in the paper"]
    assert {claim.verdict for claim in claims} == {"undecided"}


def test_without_both_heads_nothing_is_claimed(tmp_path: Path) -> None:
    write_curvature(tmp_path, table_with_ratio(0.5, ("covariance", "gcp")))
    section = section_of.section(tmp_path)
    assert section.claims == []
    assert section.remarks == ["Without runs of GAP and GCP no claim can be judged."]


def test_the_report_holds_figures_and_tables(tmp_path: Path) -> None:
    write_curvature(tmp_path, table_with_ratio(2.0))
    sections = {name: study.section for name, study in STUDIES.items()}
    markdown, _ = write_report(tmp_path, sections, "quick")
    text = markdown.read_text()
    for name in ("curvature", "curvature_ratios", "curvature_training", "curvature_kfac"):
        assert f"({name}.svg)" in text
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    summary = pd.read_csv(tmp_path / "curvature_summary.csv")
    row = summary[(summary["head"] == "GCP (5-step root)") & (summary.weights == "after training")].iloc[0]
    assert row["condition number on the range"] == pytest.approx(0.6, rel=0.02)
    assert row["‖H − G‖ / ‖H‖"] == pytest.approx(0.6, rel=0.02)


def test_work_is_counted_by_formula() -> None:
    model = cost_network(2)  # 3-2-2-P-4-4-P-10-10
    counted = work(model, torch.randn(5, 3, 32, 32))
    convolutions = [(3, 2, 32), (2, 2, 32), (2, 4, 16), (4, 4, 16)]
    forward = [5 * side**2 * 9 * c * o for c, o, side in convolutions]
    assert counted.forward == sum(forward) + 5 * 10 * 10
    assert counted.first == forward[0]
    pairs = [5 * side**2 * (25 * c * c + o * o) / 2 for c, o, side in convolutions]
    assert counted.factors == sum(pairs) + 5 * (10 * 10 + 10 * 10) / 2
    operations, moved = counted.of("forward + backward")
    assert operations == 2 * (3 * counted.forward - counted.first)
    assert moved == 3 * counted.activations


def test_costs_are_ratios_within_a_repeat() -> None:
    same = {"images": 2, "channels": 2, "peak_mib": 1.0, "bytes": 1.0, "product_ms": 0.5, "copy_ms": 1.0}
    same["operations"] = 2.0 * 1024**3  # of one large matrix product
    rows = [
        same | {"quantity": name, "repeat": repeat, "milliseconds": busy * (1 if name == "forward + backward" else 3)}
        for repeat, busy in enumerate((1.0, 100.0, 10.0))
        for name in COSTS
    ]
    table = curvature_section.summary(pd.DataFrame(rows)).set_index("quantity")
    assert table.ratio["forward + backward"] == 1.0
    assert table.ratio["GGN-vector product"] == 3.0
    assert table.times_floor["GGN-vector product"] == pytest.approx(30.0 / 0.5)
    caption = curvature_section.picture(table.reset_index(), pd.DataFrame(rows)).caption
    assert "Every quantity with a target is within it" in caption
    slow = pd.DataFrame(rows)
    slow.loc[slow.quantity == "GGN-vector product", "milliseconds"] *= 2
    caption = curvature_section.picture(curvature_section.summary(slow), slow).caption
    assert "Above its target: GGN-vector product" in caption
