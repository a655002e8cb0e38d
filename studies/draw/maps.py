"""Maps of a value over two settings, and scatters of two quantities."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from studies.draw.frame import SMALL, checked, legend, limits, log_axis, panel_grid, themed
from studies.draw.numbers import rounded
from studies.draw.palette import INK, RULE, colors, label
from studies.statistics import mean_interval

MOST_CELLS = 10
"""Side by side: so wide is the word "diverged"."""


@dataclass(frozen=True)
class Heatmap:
    """Mean of `value` over seeds by `rows` and `columns`, with half the width of its 95 % interval; the best cell framed.

    Cells whose value is not finite for some seed read "diverged". All panels share one scale of greys, darker for larger.
    """

    rows: str
    columns: str
    value: str
    panels: str | None = None
    row_label: str = ""
    column_label: str = ""
    value_label: str = ""
    best: Literal["lowest", "highest", ""] = "lowest"
    log: bool = False

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns `rows`, `columns`, `value`, `panels` and seed; InputError if it lacks one."""
        data = checked(table, [self.rows, self.columns, self.panels, "seed"], [self.value])
        height = 0.9 + 0.4 * data[self.rows].nunique()
        across = max(1, MOST_CELLS // data[self.columns].nunique())
        figure, grid, parts = panel_grid(data, self.panels, height, across)
        maps = {name: self._means(part) for name, part in parts.items()}
        ends = limits([mean.to_numpy() for mean, _ in maps.values()], self.log)
        norm = (LogNorm if self.log else Normalize)(*(ends or (0.1, 1.0)))
        for name, axes in grid.items():
            self._panel(axes, *maps[name], norm)
        shades = next(axes.collections[0] for axes in grid.values())
        bar = figure.colorbar(shades, ax=list(grid.values()), fraction=0.04, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(self.value_label or self.value)
        return figure

    def _means(self, part: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Mean and half of the interval's width by rows and columns; nan where a seed is not finite or nothing was measured."""
        cells = part.groupby([self.rows, self.columns, "seed"], sort=True)[self.value].mean()
        found = {place: mean_interval(values.to_numpy()) for place, values in cells.groupby([self.rows, self.columns])}
        index = pd.MultiIndex.from_tuples(list(found), names=[self.rows, self.columns])
        mean = pd.Series([interval.estimate for interval in found.values()], index)
        half = pd.Series([interval.high - interval.estimate for interval in found.values()], index)
        return mean.unstack(self.columns), half.unstack(self.columns)

    def _panel(self, axes: Axes, mean: pd.DataFrame, half: pd.DataFrame, norm: Normalize) -> None:
        """One map: numbers in the cells, dark letters on light greys and the other way round."""
        words = [
            [self._cell(m, h) for m, h in zip(*rows, strict=True)]
            for rows in zip(mean.to_numpy(), half.to_numpy(), strict=True)
        ]
        shades = sns.light_palette("#6F6F6F", as_cmap=True)
        sns.heatmap(
            mean, norm=norm, cmap=shades, annot=np.array(words), fmt="", cbar=False, ax=axes, linewidths=1.0, linecolor="white",
            annot_kws={"fontsize": SMALL, "color": INK},
        )  # fmt: skip
        axes.set_xticklabels([_number(value) for value in mean.columns], rotation=0, parse_math=False)
        axes.set_yticklabels([_number(value) for value in mean.index], rotation=0, parse_math=False)
        axes.set_xlabel(self.column_label or self.columns)
        axes.set_ylabel(self.row_label or self.rows)
        for row, column in np.argwhere(~np.isfinite(mean.to_numpy())):
            axes.text(column + 0.5, row + 0.5, "diverged", ha="center", va="center", fontsize=SMALL, color=INK)
        if self.best and np.isfinite(mean.to_numpy()).any():
            choose = np.nanargmin if self.best == "lowest" else np.nanargmax
            row, column = np.unravel_index(choose(mean.to_numpy()), mean.shape)
            axes.add_patch(
                Rectangle((float(column), float(row)), 1, 1, fill=False, edgecolor=INK, linewidth=1.8, clip_on=False)
            )

    @staticmethod
    def _cell(mean: float, half: float) -> str:
        if not np.isfinite(mean):
            return ""
        first, second = rounded(half, mean, half)
        return f"{first}\n±{second}" if np.isfinite(half) else first


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else label(value)


@dataclass(frozen=True)
class Scatter:
    """`y` against `x`, a point for each row of the table (a seed at a step), one colour for each `hue`.

    `line` names the line that the points are compared with: "identity" for y = x, with equal ranges.
    """

    x: str
    y: str
    hue: str = "head"
    panels: str | None = None
    x_label: str = ""
    y_label: str = ""
    line: Literal["identity", ""] = ""
    line_label: str = "equal"
    log: str = ""

    @themed
    def draw(self, table: pd.DataFrame) -> Figure:
        """The figure of a table with the columns `x`, `y`, `hue`, `panels` and seed; InputError if it lacks one."""
        data = checked(table, [self.hue, self.panels, "seed"], [self.x, self.y])
        data[self.hue] = data[self.hue].astype(str)
        words = list(dict.fromkeys(data[self.hue]))
        height = 3.4 if self.panels is None else 2.7
        figure, grid, parts = panel_grid(data, self.panels, height, sharex=True, sharey=True)
        for name, axes in grid.items():
            sns.scatterplot(
                parts[name], x=self.x, y=self.y, hue=self.hue, palette=colors(words), hue_order=words, legend=False, ax=axes,
                s=14, alpha=0.6, linewidth=0,
            )  # fmt: skip
            self._axes(axes, data)
            axes.set_xlabel(self.x_label or self.x)
            axes.set_ylabel(self.y_label or self.y)
        extra = [Line2D([], [], color=RULE, linewidth=1.0, label=self.line_label)] if self.line else []
        legend(figure, words, marker="o", extra=extra)
        return figure

    def _axes(self, axes: Axes, data: pd.DataFrame) -> None:
        """Ranges, logarithmic axes and the line."""
        ranges = [data[self.x].to_numpy(), data[self.y].to_numpy()]
        for which, values in zip("xy", ranges, strict=True):
            ends = limits(ranges if self.line else [values], which in self.log)
            if ends is not None:
                (axes.set_xlim if which == "x" else axes.set_ylim)(ends)
        for which in self.log:
            log_axis(axes, which)
        if self.line:
            axes.axline((1.0, 1.0), (2.0, 2.0), color=RULE, linewidth=1.0, zorder=1)
            if set(self.log) != {"x"}:
                axes.set_box_aspect(1)
