"""Curves over training and clouds of points: `y` against `x`, all heads in one panel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from studies.draw.frame import checked, fit, legend, panel_grid, themed
from studies.draw.palette import RULE, ZONE, colors, dashes
from studies.statistics import Interval, geometric_interval, mean_interval


def means(seeds: pd.DataFrame, x: str, y: str, interval: Callable[[np.ndarray], Interval]) -> pd.DataFrame:
    """Mean of `y` over seeds with its interval: `x` as index, columns mean, low, high; nan what is not finite.

    A mean over seeds of which one is missing or not finite (or not positive, for a geometric mean) is nan: a network that
    diverged must not make the others' mean look like that of all.
    """
    by_seed = seeds.pivot(index=x, columns="seed", values=y)
    found = [interval(values) for values in by_seed.to_numpy()]
    rows = pd.DataFrame([(i.estimate, i.low, i.high) for i in found], by_seed.index, ["mean", "low", "high"])
    return rows.where(np.isfinite(rows))


@dataclass(frozen=True)
class Panels:
    """`y` against `x`: one colour for each `hue`, a panel for each value of `panels`, all with the same ranges.

    Axes are linear unless `log` names them (``"x"``, ``"y"``, ``"xy"``).
    """

    x: str
    y: str
    hue: str = "head"
    panels: str | None = None
    x_label: str = ""
    y_label: str = ""
    log: str = ""

    def _read(self, table: pd.DataFrame, numbers: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
        """What is drawn of a table, and the words that have a colour; InputError for a column that it lacks."""
        data = checked(table, [self.hue, self.panels, "seed"], numbers)
        data[self.hue] = data[self.hue].astype(str)
        return data, list(dict.fromkeys(data[self.hue]))

    def _finish(self, axes: Axes, x: Sequence[ArrayLike], y: Sequence[ArrayLike]) -> None:
        """Names, ranges and scales of the axes of a panel; seaborn has hidden the names inside the grid."""
        axes.set(xlabel=self.x_label or self.x, ylabel=self.y_label or self.y)
        fit(axes, "x", x, "x" in self.log)
        fit(axes, "y", y, "y" in self.log)


@dataclass(frozen=True)
class Curves(Panels):
    """Thin lines the seeds, a thick line their mean, its 95 % t interval as a band; the axes show all seeds.

    An interval that is wider runs off the panel; that of two seeds, ± 12.7 standard errors, is not drawn. With `upper`,
    a column, the band goes from the mean of `y` to that of `upper`.
    """

    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    reference: float | None = None
    zone: tuple[float, float] | None = None
    upper: str = ""

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns `x`, `y`, `hue`, `panels` and seed; InputError if it lacks one."""
        columns = [self.y, self.upper] if self.upper else [self.y]
        data, words = self._read(table, [self.x, *columns])
        keys = [column for column in (self.panels, self.hue, self.x, "seed") if column is not None]
        # seeds are what an interval counts, not layers or batches
        seeds = data.groupby(keys, sort=False, dropna=False)[columns].mean().reset_index()
        figure, grid = panel_grid(seeds, self.panels, 2.7, sharex=True, sharey=True)
        marks = [value for value in (self.reference, *(self.zone or ())) if value is not None]
        for axes, part in grid:
            self._panel(axes, part, words, columns)
            self._finish(axes, [seeds[self.x]], [seeds[columns], marks])
        band = "edges of each seed" if self.upper else "seeds (bands: 95 %)"
        legend(figure, words, extra=[Line2D([], [], color=RULE, linewidth=0.6, label=band)])
        return figure

    def _panel(self, axes: Axes, part: pd.DataFrame, words: list[str], columns: list[str]) -> None:
        """Seeds, bands and means of all words in one panel."""
        if self.zone is not None:
            axes.axhspan(*self.zone, color=ZONE, linewidth=0, zorder=0)
        if self.reference is not None:
            axes.axhline(self.reference, color=RULE, linewidth=1.0, zorder=1)
        palette, styles = colors(words), dashes(words)
        interval = geometric_interval if self.mean == "geometric" else mean_interval
        for y in columns:
            visible = part[np.isfinite(part[y]) & ((part[y] > 0) | ("y" not in self.log))]
            if len(visible):
                sns.lineplot(
                    visible, x=self.x, y=y, hue=self.hue, hue_order=words, palette=palette, units="seed", estimator=None,
                    linewidth=0.6, alpha=0.45, legend=False, ax=axes,
                )  # fmt: skip
        for word, own in part.groupby(self.hue, sort=False):
            tint, style = palette[str(word)], styles[str(word)] or (None, None)
            lines = [means(own, self.x, y, interval) for y in columns]
            low, high = (lines[0]["mean"], lines[1]["mean"]) if self.upper else (lines[0].low, lines[0].high)
            if self.upper or own.seed.nunique() > 2:
                axes.fill_between(low.index, low, high, color=tint, alpha=0.15, linewidth=0)
            for line in lines:
                axes.plot(line["mean"], color=tint, linewidth=1.8, dashes=style)


@dataclass(frozen=True)
class Scatter(Panels):
    """A point for each row of the table (a seed at a step).

    `line` names the line that the points are compared with: "identity" for y = x, with equal ranges. With `own_y` every panel has
    a range of its own, for quantities of different size.
    """

    line: Literal["identity", ""] = ""
    own_y: bool = False

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns `x`, `y`, `hue`, `panels` and seed; InputError if it lacks one."""
        data, words = self._read(table, [self.x, self.y])
        figure, grid = panel_grid(data, self.panels, 2.7 if self.panels else 3.4, sharex=True, sharey=not self.own_y)
        x = [data[self.x]]
        for axes, part in grid:
            y = [(part if self.own_y else data)[self.y]]
            sns.scatterplot(
                part, x=self.x, y=self.y, hue=self.hue, hue_order=words, palette=colors(words), legend=False, ax=axes,
                s=14, alpha=0.6, linewidth=0,
            )  # fmt: skip
            self._finish(axes, *((x + y, x + y) if self.line else (x, y)))
            if self.line:
                axes.axline((1.0, 1.0), (2.0, 2.0), color=RULE, linewidth=1.0, zorder=1)
                axes.set_box_aspect(1)
        extra = [Line2D([], [], color=RULE, linewidth=1.0, label="equal")] if self.line else []
        legend(figure, words, marker="o", extra=extra)
        return figure
