"""From tables to verdicts, figures and pages, on tables whose answer is known."""

import base64
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from undrawn_figures import undrawn_figures

from studies.landscape import section as landscape_section
from studies.landscape import study as landscape
from studies.performance import section as performance_section
from studies.performance import study as performance
from studies.report import markdown_table, write_report
from studies.results import provenance, write_table
from studies.study import STUDIES

SEEDS, STEPS, ETAS = (0, 1, 2), (0, 10), (1.0, 2.0, 4.0)


def lines_with_ratio(ratio: float, poolings: tuple[str, ...] = ("gap", "gcp")) -> pd.DataFrame:
    """A table in which every quantity of GCP is `ratio` times that of GAP, up to a small spread over seeds."""
    rows = []
    for pooling, seed, step, (space, direction), eta in itertools.product(
        poolings, SEEDS, STEPS, [("feature", "ascent"), ("feature", "descent"), ("weight", "step")], ETAS
    ):
        size = (ratio if pooling == "gcp" else 1.0) * (1.0 + 0.01 * seed * (pooling == "gcp"))
        rows.append({
            "pooling": pooling, "seed": seed, "step": step, "epoch": 1, "learning_rate": 0.1,
            "space": space, "direction": direction, "eta": eta, "loss": 5.0 + 0.1 * eta * size,
            "gradient_distance": 0.01 * eta * size, "cosine": 1.0 - 1e-3 * eta * size, "beta": 0.02 * size,
            "loss_at_origin": 5.0, "gradient_norm": 0.1,
        })  # fmt: skip
    return pd.DataFrame(rows)


def write_landscape(folder: Path, lines: pd.DataFrame) -> None:
    heads = tuple(lines.pooling.unique())
    config = vars(landscape.Settings(poolings=heads)) | {"preset": "quick"}
    origin = provenance(
        "landscape",
        config,
        list(SEEDS),
        {"label": "Digits (8x8)"},
        torch.device("cpu"),
        1.0,
    )
    write_table(folder, "landscape", lines, origin)
    epochs = [
        {"pooling": p, "seed": s, "epoch": e, "train_loss": 1 / e, "test_top1": 0.9 + 0.01 * s, "seconds": 2.0}
        for p, s, e in itertools.product(heads, SEEDS, (1, 2))
    ]
    write_table(folder, "landscape_training", pd.DataFrame(epochs))


@pytest.mark.parametrize(("ratio", "word"), [(0.5, "supported"), (2.0, "not supported"), (0.99, "undecided")])
def test_verdicts_follow_the_numbers(tmp_path: Path, ratio: float, word: str) -> None:
    write_landscape(tmp_path, lines_with_ratio(ratio))
    section = landscape_section.section(tmp_path)
    assert {claim.verdict for claim in section.claims} == {word}
    assert [section.count(word, group) for group in section.groups] == [2, 9]
    for claim in section.claims:
        assert claim.interval.estimate == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("column", ["loss", "gradient_distance", "cosine", "beta"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_head_that_diverges_does_not_look_smooth(tmp_path: Path, column: str, value: float) -> None:
    lines = lines_with_ratio(0.5)
    lines.loc[(lines.pooling == "gcp") & (lines.eta == 4.0) & (lines.seed == 1), column] = value
    write_landscape(tmp_path, lines)
    section = landscape_section.section(tmp_path)
    assert {claim.verdict for claim in section.claims} == {"undecided"}
    assert any("6 of 36 measured lines hold a value that is not finite" in remark for remark in section.remarks)


def test_everything_diverged(tmp_path: Path) -> None:
    lines = lines_with_ratio(1.0)
    lines.loc[:, "loss"] = np.nan
    write_landscape(tmp_path, lines)
    write_report(tmp_path, {"landscape": landscape_section.section}, "quick")
    assert (tmp_path / "report.md").read_text().count("| **undecided** |") == 11


def test_a_zero_at_one_step_does_not_decide(tmp_path: Path) -> None:
    """A walk of length zero (learning rate 0) has no ratio; the other steps still have theirs."""
    lines = lines_with_ratio(2.0)
    still = (lines.step == 10) & (lines.pooling == "gcp")
    lines.loc[still, ["gradient_distance", "beta"]] = [0.0, np.nan]
    lines.loc[still, ["loss", "cosine"]] = [5.0, 1.0]
    write_landscape(tmp_path, lines)
    section = landscape_section.section(tmp_path)
    for claim in section.claims:
        assert claim.verdict == "not supported"
        assert claim.interval.estimate == pytest.approx(2.0, rel=0.02)
    assert any("45 ratios at single steps were left out" in remark for remark in section.remarks)


@undrawn_figures()
def test_a_table_of_another_version_does_not_stop_the_report(tmp_path: Path) -> None:
    write_landscape(tmp_path, lines_with_ratio(0.5))
    (tmp_path / "performance.csv").write_text("a,b\n1,2\n")
    write_report(tmp_path, {name: study.section for name, study in STUDIES.items()}, "quick")
    report = (tmp_path / "report.md").read_text()
    assert "`performance` could not be reported" in report
    assert "lacks the columns images, channels" in report
    assert "## Landscape" in report


def test_quantities_of_a_line_are_what_they_say() -> None:
    widths = landscape_section.by_step(lines_with_ratio(0.5))
    one = widths[(widths.pooling == "gap") & (widths.seed == 0)].iloc[0]
    assert one.loss_variation == pytest.approx(0.1 * (4.0 - 1.0))
    assert one.gradient_distance == pytest.approx(0.04)
    assert one.relative_gradient_distance == pytest.approx(0.4)
    assert one.turning == pytest.approx(4e-3)
    assert one.beta == pytest.approx(0.02)


def test_ratios_are_taken_step_by_step_and_averaged_geometrically() -> None:
    lines = lines_with_ratio(1.0)
    lines.loc[(lines.step == 10) & (lines.pooling == "gcp"), "gradient_distance"] *= 100.0
    found = landscape_section.comparisons(landscape_section.by_step(lines))
    ratio = next(c for c in found if (c.condition, c.quantity) == ("weight step", "gradient_distance"))
    assert ratio.interval.estimate == pytest.approx(10.0, rel=0.02)


def test_a_study_without_its_reference_makes_no_claim(tmp_path: Path) -> None:
    write_landscape(tmp_path, lines_with_ratio(0.5, ("covariance", "gcp")))
    section = landscape_section.section(tmp_path)
    assert section.claims == []
    assert "no claim can be judged" in section.remarks[0]


def test_speed_up_is_the_ratio_of_medians() -> None:
    times = {"textbook": [10.0, 12.0, 50.0], "gcp": [3.0, 2.0, 1.0], "one matrix product": [0.5, 0.5, 0.5]}
    rows = [
        {"images": 2, "channels": 4, "height": 3, "width": 3, "variant": variant, "repeat": r, "milliseconds": ms,
         "peak_mib": 2.0 if variant == "gcp" else 4.0}
        for variant, values in times.items() for r, ms in enumerate(values)
    ]  # fmt: skip
    summary = performance_section.summary(pd.DataFrame(rows)).set_index("variant")
    assert summary.speed_up["gcp"] == pytest.approx(6.0)
    assert summary.times_bound["textbook"] == pytest.approx(24.0)
    assert summary.memory_ratio["gcp"] == pytest.approx(0.5)


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def action() -> None:
        first = torch.zeros(1000, 1000)  # 4 MB held
        second = first + 1.0  # 4 MB more
        del first
        _ = second * 2.0  # 4 MB in place of the first

    assert performance.peak_bytes(action, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_the_page_stands_alone_and_is_reproducible(tmp_path: Path) -> None:
    write_landscape(tmp_path, lines_with_ratio(0.5))
    pages = []
    for _ in range(2):
        write_report(tmp_path, {name: study.section for name, study in STUDIES.items()}, "quick")
        pages.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert pages[0] == pages[1]
    html, markdown = pages[0]["index.html"].decode(), pages[0]["report.md"].decode()
    assert markdown.count("| **supported** |") == 11
    assert "| Landscape: is the loss smoother under GCP? | in the paper | 2 | 0 | 0 |" in markdown
    assert "| Landscape: is the loss smoother under GCP? | beyond the paper | 9 | 0 | 0 |" in markdown
    assert re.findall(r'<img src="(?!data:)', html) == []
    pictures = re.findall(r'<img src="data:image/([a-z+]+);base64,([^"]+)"', html)
    assert len(pictures) == 4
    for (kind, data), name in zip(pictures, re.findall(r"\]\(([\w]+)\.svg\)\n\n\*", markdown), strict=True):
        smaller = min((pages[0][f"{name}.{suffix}"] for suffix in ("svg", "png")), key=len)
        assert base64.b64decode(data) == smaller
        assert kind == ("png" if smaller.startswith(b"\x89PNG") else "svg+xml")
    assert {"landscape.svg", "landscape.png", "landscape_summary.csv", "report.md"} <= set(pages[0])


def test_figures_draw_the_numbers() -> None:
    from studies.landscape.figures import bands

    figure = bands(lines_with_ratio(0.5))
    axes = figure.axes
    assert [ax.get_title() for ax in axes[:2]] == ["GAP", "GCP (5-step root)"]
    upper = axes[1].lines[len(SEEDS) + 1].get_ydata()
    np.testing.assert_allclose(upper, 5.0 + 0.4 * 0.5 * 1.01, rtol=1e-3)
    assert axes[0].get_ylim() == axes[1].get_ylim()


def test_markdown_table_escapes_bars() -> None:
    assert markdown_table(pd.DataFrame({"a|b": ["|x|"]})) == "| a\\|b |\n| --- |\n| \\|x\\| |"
