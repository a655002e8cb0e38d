"""The frame of every figure: size, fonts, panels, axes, legend and files. Sizes are those at which a page shows the figure."""

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike
from PIL import Image

from secondorder.errors import InputError
from studies.draw.palette import INK, RULE, colors, dashes, label
from studies.results import write_file

WIDTH = 7.5
"""Widest figure in inches, 720 CSS pixels: a page of 800 pixels shows it in its own size, so that 8 points stay 8."""
SMALL, NORMAL = 8.0, 9.0
"""Font sizes in points, smallest and that of titles and axes."""
TICK = {"labelsize": SMALL, "labelcolor": INK, "color": RULE, "major.size": 3, "major.width": 0.8}
THEME: dict[str, Any] = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper"),
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in TICK.items()},
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
    "figure.dpi": 100,
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
}
"""The house style, whatever matplotlib's own settings are."""
themed = mpl.rc_context(THEME)  # type: ignore[arg-type]
"""Decorator of what draws a figure: in the house style, whatever matplotlib's settings are, which stay as they are."""

RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def checked(table: pd.DataFrame, columns: Collection[str | None], numbers: Collection[str]) -> pd.DataFrame:
    """A copy of `table` with the columns that a figure needs, `numbers` as floats.

    InputError for a column that is missing or holds no numbers, and for a table without rows.
    """
    needed = list(dict.fromkeys(column for column in (*columns, *numbers) if column is not None))
    if missing := [column for column in needed if column not in table.columns]:
        raise InputError(f"a table without {', '.join(missing)} cannot be drawn; it has {', '.join(map(str, table))}")
    if table.empty:
        raise InputError("a table without rows cannot be drawn; run the study first")
    try:
        return table[needed].astype(dict.fromkeys(numbers, float))
    except (TypeError, ValueError) as error:
        raise InputError(f"numbers are drawn, and the table holds words ({error}); run the study again") from None


def panel_grid(
    table: pd.DataFrame, column: str | None, height: float, most: int = 3, **options: Any
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each value of `column` (one for None), and the axes of each with its part of the table.

    Args:
        table: tidy table, one row for each number.
        column: values of this one have a panel each, in their order in the table.
        height: of one row of panels, inches.
        most: panels in a row.
        **options: of matplotlib's `Figure.subplots`.
    """
    groups = [("", table)] if column is None else [*table.groupby(column, sort=False)]
    across = min(most, len(groups))
    down = -(-len(groups) // across)
    width = WIDTH if across > 1 else 0.72 * WIDTH
    figure = Figure(figsize=(width, height * down + 0.4), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, **options).ravel()
    for axes in grid[len(groups) :]:
        axes.remove()
    for place, (axes, (value, _)) in enumerate(zip(grid, groups, strict=False)):
        axes.set_title(label(value))
        axes.tick_params(labelbottom=place >= len(groups) - across)  # also above a place without a panel
    return figure, [(axes, part) for axes, (_, part) in zip(grid, groups, strict=False)]


def legend(figure: Figure, words: Sequence[str], *, marker: str = "", extra: Sequence[Line2D] = ()) -> None:
    """A legend above the panels: the colour and dashes of each word, or its marker, and the lines of `extra`."""
    styles, tints = dashes(words), colors(words)
    width = 0 if marker else 1.8
    handles = [
        Line2D([], [], color=tints[word], label=label(word), linewidth=width, marker=marker, dashes=styles[word] or (None, None))
        for word in words
    ]  # fmt: skip
    handles += extra
    if len(handles) > 1:
        widest = 0.058 * max(len(str(handle.get_label())) for handle in handles) + 0.5  # inches
        columns = max(1, int(figure.get_figwidth() / widest))
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=2.4, columnspacing=1.4)


def limits(values: Sequence[ArrayLike], log: bool = False, margin: float = 0.05) -> tuple[float, float]:
    """The ends of an axis that shows all finite `values` (the positive ones where `log`), 0.1 and 1 if there are none."""
    every = np.concatenate([np.asarray(v, dtype=float).ravel() for v in values])
    every = every[np.isfinite(every) & ((every > 0) | (not log))]
    if every.size == 0:
        return 0.1, 1.0
    ends = np.log(every) if log else every
    low, high = float(ends.min()), float(ends.max())
    pad = margin * (high - low) or max(abs(low), 1.0) * margin
    low, high = low - pad, high + pad
    return (float(np.exp(low)), float(np.exp(high))) if log else (low, high)


def fit(axes: Axes, which: str, values: Sequence[ArrayLike], log: bool) -> None:
    """Make the ``x`` or ``y`` axis show all finite `values`."""
    ends = limits(values, log)
    axes.set(**{f"{which}scale": "log" if log else "linear", f"{which}lim": ends})
    if log:
        log_ticks(axes.xaxis if which == "x" else axes.yaxis, *ends)


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Round numbers at the ticks of a logarithmic axis; powers of ten beyond 4 decades are plain text, as all other text is."""
    decades = np.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 4 else (1.0,)
    axis.set_major_locator(MaxNLocator(5) if decades < 1 else LogLocator(subs=subs, numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}" if decades < 4 else _power)


def _power(value: float, _: object) -> str:
    """A power of ten."""
    return "10" + f"{round(np.log10(value))}".translate(RAISED)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``<name>.svg`` and ``<name>.png``; the same figure gives the same bytes. The layout is computed once, and stays."""
    # ticks are made when they are needed, in the style that holds by then
    with mpl.rc_context(THEME | {"svg.hashsalt": name, "svg.fonttype": "path"}):  # type: ignore[arg-type]
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.execute(figure)
            figure.set_layout_engine(None)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=150, pil_kwargs={"compress_level": 0})  # it is read again at once
    write_file(folder / f"{name}.svg", svg.getvalue())
    # 128 colours, a quarter of the bytes, are enough for lines, letters and their smooth edges
    palette = Image.open(png).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small = io.BytesIO()
    palette.save(small, "png", optimize=True)
    write_file(folder / f"{name}.png", small.getvalue())
