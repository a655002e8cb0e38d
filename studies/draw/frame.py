"""The frame of every figure: size, fonts, panels and legend. Sizes are those at which a page shows the figure."""

import itertools
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from secondorder.errors import InputError
from studies.draw.palette import INK, RULE, colors, dashes, label

WIDTH = 7.5
"""Widest figure in inches, 720 CSS pixels: a page of 800 pixels shows it in its own size, so that 8 points stay 8."""
SMALL, NORMAL = 8.0, 9.0
"""Font sizes in points, smallest and that of titles and axes."""

THEME: dict[str, Any] = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same letters on every machine
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "axes.titlesize": NORMAL,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": NORMAL,
    "font.size": NORMAL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "figure.dpi": 100,
}
TICKS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
"""Where a decade has ticks, from few to many."""
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
P = ParamSpec("P")


def themed(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Decorator of a `draw` method: the house style, whatever matplotlib's settings are, and unchanged afterwards."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(THEME):  # type: ignore[arg-type]
            figure = draw(*args, **kwargs)
            for axes in figure.axes:
                # ticks are made when they are needed, by then with other settings
                axes.tick_params(which="both", labelsize=SMALL, length=3, width=0.8, color=RULE, labelcolor=INK)
            return figure

    return inside


def checked(table: pd.DataFrame, columns: Collection[str | None], numbers: Collection[str | None] = ()) -> pd.DataFrame:
    """A copy of `table` with the columns that a figure needs, `numbers` as floats.

    InputError for a column that is missing or holds no numbers, and for a table without rows.
    """
    needed = [column for column in dict.fromkeys([*columns, *numbers]) if column is not None]
    missing = [column for column in needed if column not in table.columns]
    if missing:
        raise InputError(f"a table without {', '.join(missing)} cannot be drawn; it has {', '.join(map(str, table))}")
    if table.empty:
        raise InputError("a table without rows cannot be drawn; run the study first")
    copy = table[needed].copy()
    for column in (column for column in dict.fromkeys(numbers) if column is not None):
        try:
            copy[column] = copy[column].astype(float)
        except (TypeError, ValueError):
            raise InputError(f"the column {column} holds words, and numbers are drawn; run the study again") from None
    return copy


def panel_grid(
    table: pd.DataFrame, column: str | None, height: float, most: int = 3, **options: object
) -> tuple[Figure, dict[Any, Axes], dict[Any, pd.DataFrame]]:
    """A figure with a panel for each value of `column` (one panel for None), at most `most` in a row.

    Args:
        table: tidy table, one row for each number.
        column: values of this one have a panel each, in their order in the table.
        height: of one row of panels, inches.
        most: panels in a row; 1 gives a figure of half the width when there is one panel.
        **options: of `matplotlib.figure.Figure.subplots`.

    Returns:
        The figure; axes by value; the part of the table by value.
    """
    parts = {None: table} if column is None else dict(iter(table.groupby(column, sort=False)))
    across = min(most, len(parts))
    down = -(-len(parts) // across)
    width = WIDTH if across > 1 else 0.72 * WIDTH
    figure = Figure(figsize=(width, height * down + 0.4), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, **options).ravel()  # type: ignore[call-overload]
    for axes in grid[len(parts) :]:
        axes.remove()
    by_value = dict(zip(parts, grid, strict=False))
    for value, axes in by_value.items():
        if value is not None:
            axes.set_title(label(value))
    return figure, by_value, parts


def legend(figure: Figure, words: Sequence[object], *, marker: str = "", extra: Sequence[Line2D] = ()) -> None:
    """A legend above the panels: the colour and dashes of each word, or its marker, and the lines of `extra`."""
    if len(words) < 2 and not extra:
        return
    styles, tints = dashes(words), colors(words)
    handles = [
        Line2D(
            [],
            [],
            color=tints[str(word)],
            label=label(word),
            linewidth=0 if marker else 1.8,
            marker=marker or "None",
            dashes=styles[str(word)] or (None, None),
        )
        for word in words
    ]
    handles += extra
    widths = [0.064 * len(str(handle.get_label())) + 0.55 for handle in handles]  # inches
    columns = next((n for n in range(len(handles), 1, -1) if _columns_width(widths, n) < figure.get_figwidth()), 1)
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.4, columnspacing=1.4)


def _columns_width(widths: Sequence[float], columns: int) -> float:
    """Width of a legend whose entries fill `columns` columns one after the other, the first ones with one entry more."""
    rows, longer = divmod(len(widths), columns)
    starts = [column * rows + min(column, longer) for column in range(columns + 1)]
    return sum(max(widths[first:last]) for first, last in itertools.pairwise(starts))


def limits(values: Sequence[np.ndarray], log: bool = False, margin: float = 0.05) -> tuple[float, float] | None:
    """The ends of an axis that shows all finite `values` (the positive ones where `log`); None if there are none."""
    every = np.concatenate([np.asarray(v, dtype=float).ravel() for v in values])
    every = every[np.isfinite(every) & ((every > 0) | (not log))]
    if every.size == 0:
        return None
    ends = np.log(every) if log else every
    low, high = float(ends.min()), float(ends.max())
    pad = margin * (high - low) or max(abs(low), 1.0) * margin
    low, high = low - pad, high + pad
    return (float(np.exp(low)), float(np.exp(high))) if log else (low, high)


def log_axis(axes: Axes, which: str) -> None:
    """Make the ``x`` or ``y`` axis logarithmic once all is drawn, with at least 4 round numbers at its ticks.

    Powers of ten beyond 4 decades are plain text, as all other text is.
    """
    if not np.isfinite(axes.dataLim.minposx if which == "x" else axes.dataLim.minposy):
        return  # nothing positive was drawn
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    for subs in TICKS:
        values = np.asarray(LogLocator(subs=subs, numticks=9).tick_values(low, high))
        if np.count_nonzero((values >= low) & (values <= high)) >= 4:
            axis.set_major_locator(LogLocator(subs=subs, numticks=9))
            break
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_power if high / low >= 1e4 else "{x:g}")


def _power(value: float, _: object) -> str:
    """A power of ten."""
    return "10" + f"{round(np.log10(value))}".translate(RAISED)
