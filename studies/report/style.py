"""One look for all figures, and how they are saved."""

import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter
from PIL import Image

from studies.results import write_file

# Colour-blind safe (Wong 2011), the same head in the same colour in every figure.
COLOURS = {
    "gap": "#555555",
    "gcp": "#0072B2",
    "covariance": "#D55E00",
    "gcp_exact": "#009E73",
    "gcp_log": "#CC79A7",
    "dropcov": "#E69F00",
}
NAMES = {
    "gap": "GAP",
    "gcp": "GCP (5-step root)",
    "covariance": "covariance (no root)",
    "gcp_exact": "GCP (exact root)",
    "gcp_log": "GCP (logarithm)",
    "dropcov": "DropCov",
}


def colour(pooling: str) -> str:
    """The colour of a pooling head."""
    return COLOURS.get(pooling, "#000000")


def label(pooling: str) -> str:
    """The name of a pooling head for a reader."""
    return NAMES.get(pooling, pooling)


def new_figure(rows: int, columns: int, width: float, height: float, **options: object) -> tuple[Figure, np.ndarray]:
    """A figure of `rows` x `columns` axes, width and height in inches, in the house style; axes always as [rows, columns]."""
    sns.set_theme(context="paper", style="ticks", rc={"axes.spines.top": False, "axes.spines.right": False})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)  # type: ignore[call-overload]


def mean_and_seeds(axes: Axes, table: pd.DataFrame, x: str, y: str, *, tint: str, name: str) -> None:
    """Geometric mean of `y` over seeds at each `x` on a logarithmic axis, and each seed as a thin line.

    For the few seeds of a study the single curves say more than an interval at every point would.
    """
    values = table.assign(**{y: table[y].where(table[y] > 0)})  # a logarithmic axis has no place for zero
    for _, one in values.groupby("seed"):
        axes.plot(one[x], one[y], color=tint, linewidth=0.5, alpha=0.6)
    mean = values[y].transform("log").groupby(values[x]).mean().transform("exp")
    axes.plot(mean.index, mean, color=tint, linewidth=1.6, label=name)


def logarithmic(axes: Axes, which: str) -> None:
    """Make the ``x`` or ``y`` axis logarithmic, with plain numbers at as many ticks as fit; call it when all is drawn."""
    if not np.isfinite(axes.dataLim.minposx if which == "x" else axes.dataLim.minposy):
        return  # nothing positive was drawn
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = np.log10(high / low)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.8 else (1.0, 2.0, 5.0) if decades < 1.6 else (1.0,)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}" if decades < 4 else LogFormatterSciNotation())
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, folder: Path, name: str, formats: Iterable[str] = ("svg", "png")) -> None:
    """Write ``<name>.svg`` and ``<name>.png``; the same figure gives the same bytes. The layout is computed once, and stays."""
    figure.draw_without_rendering()
    with mpl.rc_context(
        {
            "svg.hashsalt": name,
            "svg.fonttype": "path",
            "figure.constrained_layout.use": False,
            "figure.autolayout": False,
        }
    ):
        figure.set_layout_engine(None)
        for suffix in formats:
            buffer = io.BytesIO()
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
            content = buffer.getvalue()
            write_file(folder / f"{name}.{suffix}", content if suffix == "svg" else _with_few_colours(content))


def _with_few_colours(png: bytes) -> bytes:
    """The picture with a palette of 128 colours, a quarter of the bytes: enough for lines, letters and their smooth edges."""
    buffer = io.BytesIO()
    palette = Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    palette.save(buffer, "png", optimize=True)
    return buffer.getvalue()
