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

from studies.results import write_file
from studies.statistics import mean_interval

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


def mean_with_interval(
    axes: Axes, table: pd.DataFrame, x: str, y: str, *, geometric: bool = False, **line: object
) -> None:
    """Mean of `y` over the rows (seeds) at each `x`, shaded by the 95 % t interval where there are several.

    `geometric` takes mean and interval of the logarithms, for quantities that a logarithmic axis shows.
    """
    values = table[y].where(table[y] > 0).transform("log") if geometric else table[y]
    intervals = {at: mean_interval(group.to_numpy()) for at, group in values.groupby(table[x])}
    places = np.array(list(intervals))
    curves = np.array([(i.low, i.estimate, i.high) for i in intervals.values()])
    low, middle, high = (np.exp(curves) if geometric else curves).T
    axes.plot(places, middle, **line)  # type: ignore[arg-type]
    if np.isfinite(low).all() and np.isfinite(high).all() and len(table) > len(places):
        axes.fill_between(places, low, high, color=line.get("color"), alpha=0.2, linewidth=0)


def save(figure: Figure, folder: Path, name: str, formats: Iterable[str] = ("svg", "png")) -> None:
    """Write ``<name>.svg`` and ``<name>.png``; the same figure gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        for suffix in formats:
            buffer = io.BytesIO()
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(buffer, format=suffix, dpi=150, metadata=metadata)
            write_file(folder / f"{name}.{suffix}", buffer.getvalue())
