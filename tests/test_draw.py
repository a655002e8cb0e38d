"""Figures draw the numbers, in letters that can be read and colours that can be told apart."""

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from fake_results import TEN, controls, forest_table, judged_claims, one_row, training
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from scipy import stats

from secondorder.errors import InputError
from studies.draw import Contours, Curves, Forest, Heatmap, Scatter, in_margins, mini, strips
from studies.draw.frame import SMALL, WIDTH, save
from studies.draw.numbers import estimate_words
from studies.draw.palette import (
    COLORS,
    HEAD_COLORS,
    LABELS,
    OPTIMIZER_COLORS,
    OUTCOME_COLORS,
    colors,
    dashes,
)
from studies.judge import Bound, Comparison, Equivalence, Interaction

LINES = training(("gap", "gcp"), seeds=3)
BANDS = Curves("step", "low", upper="high", log="y", mean="geometric")
FOREST = forest_table(judged_claims("digits", 4))
MAP = pd.DataFrame(
    [
        (row, column, seed, row + column + 0.1 * seed)
        for row in (0.1, 0.2)
        for column in (1.0, 2.0)
        for seed in range(3)
    ],
    columns=["damping", "rate", "seed", "loss"],
)
GRID = pd.DataFrame(
    [
        (head, x, y, seed, scale * (x**2 + 4 * y**2 + 0.5) + seed)
        for head, scale in (("gap", 1.0), ("gcp", 30.0))
        for x in np.linspace(-1, 1, 9)
        for y in np.linspace(-1, 2, 7)
        for seed in range(2)
    ],
    columns=["head", "x", "y", "seed", "loss"],
)
KINDS: dict[str, tuple[Any, pd.DataFrame]] = {
    "curves": (Curves("step", "loss", panels="part", zone=(0.9, 1.1), reference=1.0), LINES),
    "logarithmic curves": (Curves("step", "loss", panels="part", mean="geometric", log="y"), LINES),
    "bands": (BANDS, LINES),
    "forest": (Forest("dataset", groups="claim", margins=True), in_margins(FOREST)),
    "ratios": (Forest("claim", groups="dataset"), forest_table(controls("digits", 4))),
    "map": (Heatmap("damping", "rate", "loss"), MAP),
    "logarithmic map": (Heatmap("damping", "rate", "loss", panels="head", log=True), MAP.assign(head="gcp")),
    "contours": (Contours("x", "y", "loss", panels="head"), GRID),
    "logarithmic contours": (Contours("x", "y", "loss", panels="head", log=True), GRID),
    "scatter": (Scatter("predicted", "variation", line="identity", log="xy"), LINES),
}
GCP = {"head": "gcp"}
NUMBERS = {"estimate", "loss", "low", "predicted"}
# Machado, Oliveira, Fernandes (2009), severity 1: linear RGB as seen without red, green or blue cones
VISION = {
    "all cones": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color: str) -> np.ndarray:
    values = np.array(to_rgb(color))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(color: str, vision: str) -> np.ndarray:
    """Björn Ottosson's Oklab times 100: distance 2 is about the least that is seen."""
    lms = np.array(
        [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
    )
    lab = np.array(
        [[0.2104543, 0.7936178, -0.0040720], [1.9779985, -2.4285922, 0.4505937], [0.0259040, 0.7827718, -0.8086758]]
    )
    return 100 * lab @ np.cbrt(lms @ np.clip(np.asarray(VISION[vision]) @ linear(color), 0, 1))


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize(
    ("group", "least"), [(HEAD_COLORS, 8.0), (OPTIMIZER_COLORS, 12.0)], ids=["heads", "optimizers"]
)
def test_colours_of_a_group_can_be_told_apart(group: dict[str, str], least: float, vision: str) -> None:
    for (a, first), (b, second) in itertools.combinations(group.items(), 2):
        assert np.linalg.norm(oklab(first, vision) - oklab(second, vision)) > least, (a, b)


def test_a_colour_means_one_thing() -> None:
    for (a, first), (b, second) in itertools.combinations(COLORS.items(), 2):
        assert np.linalg.norm(oklab(first, "all cones") - oklab(second, "all cones")) > 4.0, (a, b)
    assert len(COLORS) == len(HEAD_COLORS) + len(OPTIMIZER_COLORS) + len(OUTCOME_COLORS)
    assert {*HEAD_COLORS, *OPTIMIZER_COLORS} <= set(LABELS)
    for group in (HEAD_COLORS, OPTIMIZER_COLORS):
        assert len(set(dashes(group).values())) == len(group) - 1  # the baseline and its rival are solid
    for color in OUTCOME_COLORS.values():
        assert 1.05 / (linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05) > 4.5  # contrast to white


def test_words_without_a_colour() -> None:
    tints = colors(["gap", "conv1", "conv2"])
    assert tints["gap"] == COLORS["gap"]
    assert len({*tints.values()} - {*COLORS.values()}) == 2
    with pytest.raises(InputError, match="7 words without a colour"):
        colors([f"layer {i}" for i in range(7)])


@pytest.mark.parametrize("kind", KINDS)
def test_letters_can_be_read_and_the_figure_fits(kind: str) -> None:
    figure = KINDS[kind][0].draw(KINDS[kind][1])
    figure.draw_without_rendering()
    shown = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    assert len(shown) > 5
    assert not any("$" in text.get_text() for text in shown)
    assert min(text.get_fontsize() for text in shown) >= SMALL
    assert figure.get_figwidth() <= WIDTH
    drawn = figure.get_tightbbox()
    assert drawn.x0 > -0.02
    assert drawn.x1 < figure.get_figwidth() + 0.02
    assert drawn.y0 > -0.02
    assert drawn.y1 < figure.get_figheight() + 0.02


def saved(figure: Figure, folder: Path) -> bytes:
    """The SVG that `save` writes; of the PNG beside it, which takes as long, a single point."""

    def savefig(file: Any, *, format: str, **options: Any) -> None:
        if format == "png":
            Image.new("RGB", (1, 1)).save(file, "png")
        else:
            Figure.savefig(figure, file, format=format, **options)

    figure.savefig = savefig  # type: ignore[method-assign]
    save(figure, folder, "a")
    return (folder / "a.svg").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_table_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    description, table = KINDS[kind]
    before = table.copy()
    content = saved(description.draw(table), tmp_path)
    with mpl.rc_context(
        {"font.size": 20, "axes.grid": True, "xtick.labelsize": 3, "ytick.major.size": 9, "lines.linewidth": 9}
    ):
        assert saved(description.draw(table), tmp_path) == content
    pd.testing.assert_frame_equal(table, before)


@pytest.mark.parametrize("kind", KINDS)
def test_words_of_a_table_are_drawn_as_they_are(kind: str, tmp_path: Path) -> None:
    description, table = KINDS[kind]
    payload = r"$\frac{x$ </text><script>alert(1)</script>"
    words = [c for c in table if table[c].dtype == object and c not in ("claimed", "outcome")]
    odd = table.assign(**{c: table[c] + payload for c in words}) if words else table.assign(damping=payload)
    drawn = ElementTree.fromstring(saved(description.draw(odd), tmp_path))
    tags = {str(element.tag).rpartition("}")[2] for element in drawn.iter()}
    assert "script" not in tags


@pytest.mark.parametrize("kind", KINDS)
def test_tables_that_cannot_be_drawn(kind: str) -> None:
    description, table = KINDS[kind]
    with pytest.raises(InputError, match="without seed"):
        description.draw(table.drop(columns="seed"))
    with pytest.raises(InputError, match="without rows"):
        description.draw(table.iloc[:0])
    with pytest.raises(InputError, match="holds words"):
        description.draw(table.assign(**dict.fromkeys(NUMBERS & {*table}, "x")))


def thick(axes: Any, head: str) -> np.ndarray:
    """The ends of the thick line of a head."""
    lines = [
        line for line in axes.lines if line.get_linewidth() == 1.8 and to_hex(line.get_color()).upper() == COLORS[head]
    ]
    assert len(lines) == 1
    return np.asarray(lines[0].get_ydata(), dtype=float)


def test_curves_draw_mean_interval_and_seeds() -> None:
    table = LINES[LINES.part == "early"]
    axes = Curves("step", "loss").draw(table).axes[0]
    own = table[table["head"] == "gcp"].pivot(index="step", columns="seed", values="loss")
    np.testing.assert_allclose(thick(axes, "gcp"), own.mean(axis=1))
    half = stats.t.ppf(0.975, 2) * own.std(axis=1).iloc[0] / np.sqrt(3)
    band = axes.collections[1].get_paths()[0].vertices
    start = band[band[:, 0] == 0.0, 1]
    np.testing.assert_allclose([start.min(), start.max()], own.mean(axis=1).iloc[0] + np.array([-half, half]))
    assert sum(line.get_linewidth() == 0.6 for line in axes.lines) == 2 * 3
    assert axes.get_yscale() == "linear"


def test_compared_panels_share_their_range_and_geometric_means() -> None:
    figure = Curves("step", "loss", panels="part", mean="geometric", log="y").draw(LINES)
    early = LINES[(LINES.part == "early") & (LINES["head"] == "gap")].pivot(index="step", columns="seed", values="loss")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    np.testing.assert_allclose(thick(panels["early"], "gap"), np.exp(np.log(early).mean(axis=1)))
    assert panels["early"].get_ylim() == panels["late"].get_ylim()
    low, high = panels["early"].get_ylim()
    assert low < LINES.loss.min() < LINES.loss.max() < high


@pytest.mark.parametrize("lost", ["missing", np.nan, np.inf])
def test_the_mean_of_a_head_ends_where_a_seed_diverges(lost: Any) -> None:
    table = LINES[LINES.part == "early"].copy()
    gone = (table["head"] == "gcp") & (table.seed == 1) & (table.step >= 100)
    table = table[~gone] if lost == "missing" else table.assign(loss=table.loss.where(~gone, lost))
    axes = Curves("step", "loss").draw(table).axes[0]
    steps = np.unique(LINES.step)
    np.testing.assert_array_equal(np.isfinite(thick(axes, "gcp")), steps < 100)
    assert np.isfinite(thick(axes, "gap")).all()


def test_bands_lie_between_geometric_means_of_the_edges() -> None:
    table = LINES[(LINES.part == "early") & (LINES["head"] == "gcp")]
    axes = BANDS.draw(table).axes[0]
    edges = [np.asarray(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 1.8]
    for column, edge in zip(("low", "high"), edges, strict=True):
        by_seed = table.pivot(index="step", columns="seed", values=column)
        np.testing.assert_allclose(edge, np.exp(np.log(by_seed).mean(axis=1)))


@pytest.mark.parametrize(
    ("compare", "interval", "margins"),
    [
        (TEN, (0.9, 0.81, 1.0), (1.0, 0.0, 2.0)),
        (TEN, (1.1, 1.0, 1.21), (-1.0, -2.0, 0.0)),
        (Bound(GCP, "above", 0.0, 0.1, "fisher"), (0.2, 0.1, 0.3), (2.0, 1.0, 3.0)),
        (
            Interaction(GCP, {"head": "gap"}, {"optimizer": "sgd"}, {"optimizer": "kfac"}),
            (-0.3, -0.4, -0.2),
            (3.0, 2.0, 4.0),
        ),
        (Bound(GCP, "below", 100.0, 10.0, "log"), (81.0, 81.0, 81.0), (2.0, 2.0, 2.0)),
        (Equivalence(TEN), (1.1, 0.9, 1.21), (1.0, -1.0, 2.0)),
        (Bound(GCP, "below", 0.0), (0.2, 0.1, 0.3), (np.nan, np.nan, np.nan)),
    ],
)
def test_margins(compare: Comparison, interval: tuple[float, ...], margins: tuple[float, ...]) -> None:
    row = in_margins(one_row(compare, *interval, "undecided"))  # type: ignore[arg-type]
    np.testing.assert_allclose(row.iloc[0][["estimate", "low", "high"]].astype(float), margins, atol=1e-12)
    np.testing.assert_allclose(row.estimate, margins[0], atol=1e-12)


@pytest.mark.parametrize("outcome", [*OUTCOME_COLORS, ""])
def test_markers_are_filled_when_decided(outcome: str) -> None:
    table = one_row(TEN, 0.8, 0.75, 0.85, outcome)
    for figure in (Forest("dataset").draw(table), mini(in_margins(table))):
        marker = figure.axes[0].lines[-1]
        filled = to_hex(marker.get_markerfacecolor()) == to_hex(marker.get_color())
        assert filled == (outcome in {"supported", "contradicted", "no effect", "proved"})
        assert to_hex(marker.get_color()).upper() == OUTCOME_COLORS.get(outcome, "#1A1A1A")
    words = {text.get_text() for text in Forest("dataset").draw(table).axes[0].texts}
    assert {"digits", "0.80 [0.75, 0.85]", "◂ as claimed", "contrary ▸"} <= words
    assert outcome in words


def test_intervals_that_leave_the_axis_end_in_arrows() -> None:
    table = in_margins(
        pd.concat([one_row(TEN, 0.9, 1e-30, np.inf, "undecided"), one_row(TEN, 1e-9, 1e-9, 1e-9, "proved")])
    )
    markers = [line.get_marker() for line in mini(table).axes[0].lines]
    assert markers.count("<") == 1
    assert markers.count(">") == 2
    assert markers.count("o") == 1
    assert not mini(in_margins(one_row(TEN, np.nan, np.nan, np.nan, "not measured"))).axes[0].lines[1:]


def test_maps_name_what_diverged_and_frame_the_best() -> None:
    table = MAP.assign(loss=MAP.loss.where((MAP.damping != 0.2) | (MAP.rate != 2.0) | (MAP.seed != 1), np.inf))
    axes = Heatmap("damping", "rate", "loss").draw(table).axes[0]
    words = [text.get_text() for text in axes.texts]
    assert words.count("diverged") == 1
    assert "1.20\n±0.25" in words  # 0.1 + 1 + 0.1, half width t_2 0.1 / sqrt(3) = 0.248
    assert axes.patches[0].get_xy() == (0.0, 0.0)
    assert Heatmap("damping", "rate", "loss", best="highest").draw(table).axes[0].patches[0].get_xy() == (1.0, 0.0)


def test_signed_maps_have_two_colours_and_bold_words_where_zero_is_excluded() -> None:
    table = MAP.assign(loss=MAP.loss - 1.35, damping="d" + MAP.damping.astype(str))
    axes = Heatmap("damping", "rate", "loss", best="", signed=True).draw(table).axes[0]
    cells = table.groupby(["damping", "rate"]).loss
    sure = cells.mean().abs() > 2.48 * cells.std()  # half width t_2 s / sqrt(3)
    words = {text.get_text(): text.get_weight() for text in axes.texts}
    assert sure.any()
    assert [*words.values()].count("bold") == sure.sum()
    low, high = axes.collections[0].norm.vmin, axes.collections[0].norm.vmax
    assert low == -high
    backwards = Heatmap("damping", "rate", "loss", signed=True).draw(table[::-1]).axes[0]
    assert [t.get_text() for t in backwards.get_yticklabels()] == [*dict.fromkeys(table.damping[::-1])]


def drawn_contours(description: Contours, table: pd.DataFrame) -> list[Any]:
    """What is filled, the lines, and the cross of the first panel."""
    axes = description.draw(table).axes[0]
    return [*axes.collections[:2], *axes.lines]


def test_contours_are_where_the_mean_over_seeds_has_their_value() -> None:
    table = GRID[GRID["head"] == "gap"]
    filled, lines, cross = drawn_contours(Contours("x", "y", "loss"), table)
    levels = np.asarray(lines.levels)
    assert levels[0] <= table.groupby(["x", "y"]).loss.mean().min() < levels[1]
    assert levels[-2] < table.groupby(["x", "y"]).loss.mean().max() <= levels[-1]
    assert len(levels) <= 11
    np.testing.assert_array_equal(filled.levels, levels)
    fine = [np.linspace(-1, 1, 201), np.linspace(-1, 2, 301)]
    x, y = np.meshgrid(*fine, indexing="ij")
    bowl = pd.DataFrame({"x": x.ravel(), "y": y.ravel(), "loss": (x**2 + 4 * y**2).ravel(), "seed": 0})
    lines = drawn_contours(Contours("x", "y", "loss"), bowl)[1]
    assert lines.levels[0] == 0
    for level, path in zip(lines.levels, lines.get_paths(), strict=True):
        points = path.vertices
        np.testing.assert_allclose(points[:, 0] ** 2 + 4 * points[:, 1] ** 2, level, rtol=1e-3, atol=1e-3)
    assert (cross.get_xdata(), cross.get_ydata()) == ([0], [0])
    away = drawn_contours(Contours("x", "y", "loss"), table.assign(x=table.x + 5))
    assert len(away) == 2  # no origin, no cross


@pytest.mark.parametrize("log", [False, True])
def test_panels_of_contours_share_their_levels(log: bool) -> None:
    figure = Contours("x", "y", "loss", panels="head", log=log).draw(GRID)
    first, second = (axes.collections[0] for axes in figure.axes[:2])
    np.testing.assert_array_equal(first.levels, second.levels)
    assert (first.norm.vmin, first.norm.vmax) == (second.norm.vmin, second.norm.vmax)
    assert first.levels[0] <= GRID.loss.min() + 0.5
    if log:
        assert first.levels[0] > 0
        assert len(first.levels) <= 11


def test_contours_leave_out_what_is_not_finite_or_has_no_logarithm() -> None:
    table = GRID[GRID["head"] == "gap"].copy()
    table.loc[(table.x == 1) & (table.seed == 1), "loss"] = np.inf
    table.loc[table.x == -1, "loss"] = -1.0
    shown = [drawn_contours(Contours("x", "y", "loss", log=log), table)[0] for log in (False, True)]
    ends = [[path.vertices[:, 0] for path in filled.get_paths() if len(path.vertices)] for filled in shown]
    assert [max(np.concatenate(x)) for x in ends] == [0.75, 0.75]
    assert [min(np.concatenate(x)) for x in ends] == [-1.0, -0.75]


def test_contours_of_a_plain_and_of_what_is_no_grid() -> None:
    table = GRID[GRID["head"] == "gap"]
    filled = drawn_contours(Contours("x", "y", "loss"), table.assign(loss=3.0))[0]
    assert filled.levels[0] < 3 < filled.levels[-1]
    with pytest.raises(InputError, match="contours need a full grid, got 62 places of 9 values of x and 7 of y"):
        Contours("x", "y", "loss").draw(table.iloc[2:])
    with pytest.raises(InputError, match="contours need a full grid, got 9 places of 9 values of x and 1 of y"):
        Contours("x", "y", "loss").draw(table[table.y == 2])


def test_strips_put_every_picture_beside_its_name() -> None:
    grey, colour = np.full((3, 4, 4, 1), 9, np.uint8), np.full((2, 4, 4, 3), 9, np.uint8)
    figure = strips({"a": grey, "b": colour, "c": grey}, columns=2)
    assert [text.get_text() for text in figure.texts] == ["a", "b", "c"]
    shown = [axes.images[0].get_array() for axes in figure.axes]
    assert [picture.shape for picture in shown] == [(5, 15, 3), (5, 10, 3), (5, 15, 3)]
    assert (shown[0][:4, :4] == 9).all()
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(-1e-9 <= box.x0 < box.x1 <= 1 and -1e-9 <= box.y0 < box.y1 <= 1 + 1e-9 for box in boxes)
    assert boxes[2].x0 > boxes[0].x1  # the third row begins the second block
    assert boxes[1].y1 == pytest.approx(boxes[0].y0)


def test_panels_of_a_cloud_share_a_range_or_have_their_own() -> None:
    table = pd.DataFrame({"x": [1.0, 2.0] * 2, "y": [1.0, 2.0, 100.0, 200.0], "panel": ["a"] * 2 + ["b"] * 2})
    table = table.assign(head="gap", seed=0)
    for own in (False, True):
        figure = Scatter("x", "y", panels="panel", own_y=own).draw(table)
        first, second = (axes.get_ylim() for axes in figure.axes[:2])
        assert bool(first == second) is not own
        assert bool(first[1] < 10) is own


def test_a_scatter_has_its_line_and_equal_ranges() -> None:
    axes = Scatter("predicted", "variation", line="identity", log="xy").draw(LINES).axes[0]
    assert axes.get_xlim() == axes.get_ylim()
    assert len(axes.collections[0].get_offsets()) == len(LINES)


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((0.853, 0.789, 0.921), "0.85 [0.79, 0.92]"),
        ((-0.2149, -0.2262, -0.2031), "−0.215 [−0.226, −0.203]"),
        ((1234.5, 1000.0, 1500.0), "1234 [1000, 1500]"),
        ((1.5, -np.inf, np.inf), "1.5"),
        ((2.0, 2.0, 2.0), "2 [2, 2]"),
        ((1.2e-9, 1.1e-9, 1.3e-9), "1.2e−09 [1.1e−09, 1.3e−09]"),
        ((np.nan, np.nan, np.nan), ""),
        ((2.62, 0.188, 36.7), "2.6 [0.19, 37]"),
        ((0.05, 0.01, 0.25), "0.05 [0.01, 0.25]"),
        ((137.0, 3.0, 6000.0), "140 [3, 6000]"),
        (
            (0.0365, 0.003, 0.07),
            "0.036 [0.003, 0.070]",
        ),  # a correlation: symmetric as it is, not on a logarithmic scale
    ],
)
def test_numbers_have_the_digits_that_their_interval_is_worth(interval: tuple[float, ...], words: str) -> None:
    assert estimate_words(*interval) == words
