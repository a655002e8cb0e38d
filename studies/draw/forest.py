"""Forest plots: one row for each estimate, its interval against the zone of practical equivalence, every seed as a point."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from studies.draw.frame import NORMAL, SMALL, WIDTH, checked, legend, limits, log_axis, themed
from studies.draw.palette import INK, OUTCOME_COLORS, RULE, ZONE, colors, label

DECIDED = ("supported", "contradicted", "no effect", "proved")
"""Outcomes whose marker is filled."""
NUMBERS = ("estimate", "low", "high", "zone_low", "zone_high", "reference")
ROW, ABOVE, BELOW, TITLE = 0.235, 0.28, 0.55, 0.22
"""Heights in inches: of a row, of the words above a panel, of the axis below it, of the panel's title."""
FARTHEST = 30.0
"""Margins that a small picture shows; what lies further out ends in an arrow there."""
Lines = list[tuple[str, pd.DataFrame | None]]


@dataclass(frozen=True)
class Forest:
    """Rows of estimate, 95 % interval and seeds (small points), the equivalence zone shaded, numbers and outcome at the right.

    Filled markers are decided outcomes, hollow ones undecided or exploratory. An interval that leaves the axis ends in an arrow.

    Args:
        rows: column with the label of a row.
        groups: column whose values head a group of rows (a claim, a network); None for no groups.
        panels: column whose values have panels with axes of their own, one below the other (ratios, differences); None for one.
        hue: column that gives the colour (head, optimizer); None: the colour of the outcome.
        x_label: name of the axis; by value of `panels` where it is a mapping.
        titles: names of the panels, where the palette has none.
        margins: the table is in margins (see `in_margins`): a linear axis from -1 to 1, logarithmic beyond.
        labels: room for the labels at the left, share of the width.
    """

    rows: str = "network"
    groups: str | None = None
    panels: str | None = None
    hue: str | None = None
    x_label: str | Mapping[str, str] = ""
    titles: Mapping[str, str] = field(default_factory=dict)
    margins: bool = False
    labels: float = 0.26

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns that `forest_table` makes; InputError if it lacks one that is drawn."""
        words = [self.rows, self.groups, self.panels, self.hue, "seed", "outcome", "claimed", "log", "numbers"]
        data = checked(table, words, NUMBERS)
        parts = {None: data} if self.panels is None else dict(iter(data.groupby(self.panels, sort=False)))
        lines = {value: self._lines(part) for value, part in parts.items()}
        hues = [] if self.hue is None else list(dict.fromkeys(data[self.hue].astype(str)))
        y = height = self._height(list(lines.values()), len(hues))
        figure = Figure(figsize=(WIDTH, height))
        y -= 0.25 * (len(hues) > 1)
        for value, part in parts.items():
            tall = ROW * len(lines[value])
            y -= ABOVE + TITLE * (value is not None) + tall
            axes = figure.add_axes((self.labels, y / height, 0.61 - self.labels, tall / height))
            self._panel(axes, part, lines[value])
            axes.set_xlabel(self.x_label if isinstance(self.x_label, str) else self.x_label.get(str(value), ""))
            if value is not None:
                title = self.titles.get(str(value), label(value))
                axes.text(0.01, (y + tall + ABOVE) / height, title, transform=figure.transFigure, weight="bold")
            y -= BELOW
        legend(figure, hues, marker="o")
        return figure

    def _height(self, lines: list[Lines], hues: int) -> float:
        """Of the figure in inches."""
        panels = sum(ABOVE + ROW * len(rows) + BELOW for rows in lines)
        return panels + TITLE * len(lines) * (self.panels is not None) + 0.25 * (hues > 1)

    def _lines(self, part: pd.DataFrame) -> Lines:
        """From top to bottom: headings (without a table) and rows with their estimate and seeds."""
        lines: Lines = []
        grouped: Any = [("", part)] if self.groups is None else part.groupby(self.groups, sort=False)
        keys = [self.rows] if self.hue is None else [self.rows, self.hue]
        for heading, group in grouped:
            if self.groups is not None:
                lines.append((label(heading), None))
            lines += [(label(key[0]), row) for key, row in group.groupby(keys, sort=False)]
        return lines

    def _panel(self, axes: Axes, part: pd.DataFrame, lines: Lines) -> None:
        """All rows of a panel, top to bottom, on an axis that holds all estimates, seeds and zones."""
        axes.set_ylim(len(lines) - 0.4, -0.5)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        if self.margins:
            self._margins(axes, part)
        else:
            self._range(axes, part)
        for height, (words, row) in enumerate(lines):
            if row is None:
                _text(axes, words, (0.01, height), (0, 0), "figure fraction", fontsize=NORMAL, weight="bold")
            else:
                _text(axes, words, (0, height), (-8, 0), "axes fraction", ha="right")
                self._row(axes, height, row)
        self._sides(axes, part)

    def _margins(self, axes: Axes, part: pd.DataFrame) -> None:
        """A linear axis within the margins and a logarithmic one beyond, that holds all estimates."""
        farthest = [np.nanmin([-3.0, part.estimate.min()]) * 1.2, np.nanmax([3.0, part.estimate.max()]) * 1.2]
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.8)
        axes.set_xlim(*farthest)
        decades = [a * 10.0**power for power in range(6) for a in (1, 3)]
        axes.set_xticks([t for t in (0.0, *decades, *(-d for d in decades)) if farthest[0] <= t <= farthest[1]])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
        axes.xaxis.set_minor_locator(NullLocator())

    def _range(self, axes: Axes, part: pd.DataFrame) -> None:
        """The range of estimates, seeds and zones, and of intervals up to three times as wide; logarithmic for ratios."""
        log = bool(part["log"].all())
        core = [part[column].to_numpy() for column in ("estimate", "zone_low", "zone_high", "reference")]
        ends = limits(core, log)
        if ends is None:
            return
        low, high = np.log(ends) if log else ends
        far = np.array([low - (high - low), high + (high - low)])
        outer = [np.clip(part[column].to_numpy(), *(np.exp(far) if log else far)) for column in ("low", "high")]
        whole = limits([*core, *outer], log) or ends
        axes.set_xlim(whole)
        if log:
            axes.update_datalim([(whole[0], 0), (whole[1], 0)])
            log_axis(axes, "x")
            axes.set_xlim(whole)

    def _row(self, axes: Axes, height: float, row: pd.DataFrame) -> None:
        """Zone, reference, seeds, interval and estimate, and at the right what came out."""
        estimates, seeds = row[row.seed < 0], row[row.seed >= 0]
        first = (estimates if len(estimates) else row).iloc[0]
        word = str(first[self.hue]) if self.hue is not None else first.outcome
        tint = colors([word])[word] if self.hue is not None else OUTCOME_COLORS.get(word, INK)
        axes.fill_betweenx(
            [height - 0.5, height + 0.5], first.zone_low, first.zone_high, color=ZONE, linewidth=0, zorder=0
        )
        axes.plot([first.reference] * 2, [height - 0.5, height + 0.5], color=RULE, linewidth=1.0, zorder=1)
        level = np.full(len(seeds), height + 0.27)
        axes.plot(seeds.estimate, level, "o", color=tint, markersize=2.3, alpha=0.5, markeredgewidth=0)
        if len(estimates):
            interval(axes, height, first, tint)
            _text(axes, str(first.numbers), (1, height), (12, 0), "axes fraction")
            shade = OUTCOME_COLORS.get(first.outcome, INK)
            _text(axes, str(first.outcome), (1, height), (138, 0), "axes fraction", color=shade, weight="bold")

    def _sides(self, axes: Axes, part: pd.DataFrame) -> None:
        """Above the panel on which side of the zone the claim lies, where all rows claim the same."""
        if part.claimed.nunique() != 1 or part.claimed.iloc[0] not in ("below", "above"):
            return
        words = ("◂ as claimed", "contrary ▸") if part.claimed.iloc[0] == "below" else ("◂ contrary", "as claimed ▸")
        for side, align, x in ((words[0], "left", 0.0), (words[1], "right", 1.0)):
            axes.text(x, 1, side, transform=axes.transAxes, ha=align, va="bottom", fontsize=SMALL, color="#6F6F6F")


def _text(
    axes: Axes, words: str, place: tuple[float, float], offset: tuple[float, float], x: str, **options: Any
) -> None:
    """Words beside a row; `place` in the coordinates `x` and rows."""
    options = {"va": "center", "fontsize": SMALL, "annotation_clip": False, **options}
    axes.annotate(words, place, offset, xycoords=(x, "data"), textcoords="offset points", **options)


def interval(axes: Axes, height: float, row: "pd.Series[Any]", tint: str, size: float = 5.0) -> None:
    """An estimate as a marker, filled when decided, on its interval; arrows where these leave the axis."""
    left, right = axes.get_xlim()
    if not np.isfinite(row.estimate):
        return
    low, high = (row.estimate if np.isnan(end) else end for end in (row.low, row.high))
    axes.plot(
        np.clip([low, high], left, right), [height] * 2, color=tint, linewidth=1.5, zorder=2, solid_capstyle="butt"
    )
    for beyond, end, arrow in ((low < left, left, "<"), (high > right, right, ">")):
        if beyond:
            axes.plot([end], [height], arrow, color=tint, markersize=size, markeredgewidth=0, clip_on=False, zorder=3)
    if left <= row.estimate <= right:
        face = tint if row.outcome in DECIDED else "white"
        axes.plot(
            [row.estimate], [height], "o", color=tint, markersize=size, markerfacecolor=face, clip_on=False, zorder=4
        )


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
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.8)
    axes.set_xlim(-FARTHEST, FARTHEST)
    axes.set_ylim(len(data) - 0.35, -0.65)
    axes.axvspan(-1, 1, color=ZONE, linewidth=0)
    axes.axvline(0, color=RULE, linewidth=1.0)
    for height, (_, row) in enumerate(data.iterrows()):
        interval(axes, height, row, OUTCOME_COLORS.get(row.outcome, INK), size=4.5)
    return figure
