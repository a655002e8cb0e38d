"""Forest plots: one row for each estimate, its interval against the zone of practical equivalence, every seed as a point."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from studies.draw.frame import NORMAL, SMALL, WIDTH, checked, fit, limits, themed
from studies.draw.palette import INK, OUTCOME_COLORS, RULE, ZONE, label

DECIDED = ("supported", "contradicted", "no effect", "proved")
"""Outcomes whose marker is filled."""
NUMBERS = ("estimate", "low", "high", "zone_low", "zone_high", "reference")
ROW, ABOVE, BELOW = 0.235, 0.28, 0.55
"""Heights in inches: of a row, of the words above the rows, of the axis below them."""
FARTHEST = 30.0
"""Margins that a small picture shows; what lies further out ends in an arrow there."""


@dataclass(frozen=True)
class Forest:
    """Rows of estimate, 95 % interval and seeds (small points), the equivalence zone shaded, numbers and outcome at the right.

    Filled markers are decided outcomes, hollow ones undecided or exploratory. An interval that leaves the axis ends in an arrow.

    Args:
        rows: column with the label of a row.
        groups: column whose values head a group of rows (a claim, a network); None for no groups.
        x_label: name of the axis.
        margins: the table is in margins (see `in_margins`): a linear axis from -1 to 1, logarithmic beyond.
        labels: room for the labels at the left, share of the width.
    """

    rows: str = "network"
    groups: str | None = None
    x_label: str = ""
    margins: bool = False
    labels: float = 0.26

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns of a `forest_row`; InputError if it lacks one that is drawn."""
        data = checked(table, [self.rows, self.groups, "seed", "outcome", "claimed", "log", "numbers"], NUMBERS)
        lines: list[tuple[str, pd.DataFrame | None]] = []
        for heading, group in [("", data)] if self.groups is None else data.groupby(self.groups, sort=False):
            lines += [(label(heading), None)] if self.groups is not None else []
            lines += [(label(name), row) for name, row in group.groupby(self.rows, sort=False)]
        tall = ROW * len(lines)
        height = ABOVE + tall + BELOW
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.add_axes((self.labels, BELOW / height, 0.61 - self.labels, tall / height))
        axes.spines["left"].set_visible(False)
        axes.set(xlabel=self.x_label, ylim=(len(lines) - 0.4, -0.5), yticks=[])
        if self.margins:
            _margins_axis(axes, 1.2 * min(-3.0, data.estimate.min()), 1.2 * max(3.0, data.estimate.max()))
        else:
            _axis(axes, data)
        for place, (words, row) in enumerate(lines):
            if row is None:
                _text(axes, words, (0.01, place), 0, "figure fraction", fontsize=NORMAL, weight="bold")
            else:
                _text(axes, words, (0, place), -8, "axes fraction", ha="right")
                _row(axes, place, row)
        if data.claimed.nunique() == 1 and data.claimed.iloc[0] in ("below", "above"):
            below = data.claimed.iloc[0] == "below"
            sides = ("◂ as claimed", "contrary ▸") if below else ("◂ contrary", "as claimed ▸")
            for x, align, side in zip((0.0, 1.0), ("left", "right"), sides, strict=True):
                axes.text(x, 1, side, transform=axes.transAxes, ha=align, va="bottom", fontsize=SMALL, color="#6F6F6F")
        return figure


def _margins_axis(axes: Axes, low: float, high: float) -> None:
    """A linear axis within the margins and a logarithmic one beyond."""
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.8)
    axes.set_xlim(low, high)
    decades = [a * 10.0**power for power in range(6) for a in (1, 3)]
    axes.set_xticks([t for t in (0.0, *decades, *(-d for d in decades)) if low <= t <= high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    axes.xaxis.set_minor_locator(NullLocator())


def _axis(axes: Axes, data: pd.DataFrame) -> None:
    """The range of estimates, seeds and zones, and of intervals up to three times as wide; logarithmic for ratios."""
    log = bool(data["log"].all())
    core = [data[["estimate", "zone_low", "zone_high", "reference"]]]
    fit(axes, "x", [*core, data[["low", "high"]].clip(*limits(core, log, margin=1.0))], log)


def _row(axes: Axes, place: float, row: pd.DataFrame) -> None:
    """Zone, reference, seeds, interval and estimate, and at the right what came out."""
    estimates, seeds = row[row.seed < 0], row[row.seed >= 0]
    first = row.iloc[0]
    tint = OUTCOME_COLORS.get(first.outcome, INK)
    edges = [place - 0.5, place + 0.5]
    axes.fill_betweenx(edges, first.zone_low, first.zone_high, color=ZONE, linewidth=0, zorder=0)
    axes.plot([first.reference] * 2, edges, color=RULE, linewidth=1.0, zorder=1)
    level = np.full(len(seeds), place + 0.27)
    axes.plot(seeds.estimate, level, "o", color=tint, markersize=2.3, alpha=0.5, markeredgewidth=0)
    for _, found in estimates.head(1).iterrows():
        _interval(axes, place, found)
        _text(axes, str(found.numbers), (1, place), 12, "axes fraction")
        _text(axes, str(found.outcome), (1, place), 138, "axes fraction", color=tint, weight="bold")


def _text(axes: Axes, words: str, place: tuple[float, float], points: float, x: str, **options: Any) -> None:
    """Words beside a row, `points` to the right of a place in the coordinates `x` and rows."""
    options = {"va": "center", "fontsize": SMALL, "annotation_clip": False, **options}
    axes.annotate(words, place, (points, 0), xycoords=(x, "data"), textcoords="offset points", **options)


def _interval(axes: Axes, place: float, row: "pd.Series[Any]", size: float = 5.0) -> None:
    """An estimate as a marker, filled when decided, on its interval; arrows where these leave the axis."""
    left, right = axes.get_xlim()
    tint = OUTCOME_COLORS.get(row.outcome, INK)
    if not np.isfinite(row.estimate):
        return
    low, high = (row.estimate if np.isnan(end) else end for end in (row.low, row.high))
    ends = np.clip([low, high], left, right)
    axes.plot(ends, [place] * 2, color=tint, linewidth=1.5, zorder=2, solid_capstyle="butt")
    for beyond, end, arrow in ((low < left, left, "<"), (high > right, right, ">")):
        if beyond:
            axes.plot([end], [place], arrow, color=tint, markersize=size, markeredgewidth=0, clip_on=False, zorder=3)
    if left <= row.estimate <= right:
        face = tint if row.outcome in DECIDED else "white"
        axes.plot([row.estimate], [place], "o", color=tint, mfc=face, markersize=size, clip_on=False, zorder=4)


@themed
def mini(table: pd.DataFrame, width: float = 1.6) -> Figure:
    """A cell of the table of claims: a line for each data set of a table in margins (see `in_margins`), without words.

    All cells have the same axis, so that they can be compared: -30 to 30 margins, linear within the zone of equivalence.
    """
    data = checked(table, ["outcome", "seed"], NUMBERS)
    data = data[data.seed < 0]
    figure = Figure(figsize=(width, 0.12 + 0.17 * len(data)))
    axes = figure.add_axes((0.04, 0.0, 0.92, 1.0))
    axes.set_axis_off()
    _margins_axis(axes, -FARTHEST, FARTHEST)
    axes.set_ylim(len(data) - 0.35, -0.65)
    axes.axvspan(-1, 1, color=ZONE, linewidth=0)
    axes.axvline(0, color=RULE, linewidth=1.0)
    for place, (_, row) in enumerate(data.iterrows()):
        _interval(axes, place, row, size=4.5)
    return figure
