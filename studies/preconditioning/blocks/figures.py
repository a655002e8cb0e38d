"""Figures of part D: spectra before and after K-FAC, conditioning over training, and K-FAC's fidelity."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.preconditioning.blocks.measure import AFTER, BEFORE, CONVOLUTIONS
from studies.preconditioning.blocks.reading import MEASURES, per_seed, phase_name
from studies.preconditioning.situation import UNTRAINED
from studies.report.style import colour, label, logarithmic, mean_and_seeds, new_figure
from studies.statistics import geometric_interval

STYLES = {BEFORE: "-", AFTER: "--"}
TITLES = {BEFORE: "no preconditioner", AFTER: "K-FAC, damping 0.01"}


def spectra(end: pd.DataFrame) -> Figure:
    """Eigenvalues of the last convolution relative to the largest; a row a preconditioner, a column a backbone."""
    listed = end[end.measure.str.startswith("eigenvalue ")]
    listed = listed.assign(rank=listed.measure.str.removeprefix("eigenvalue ").astype(int))
    backbones = list(end.backbone.unique())
    figure, axes = new_figure(2, len(backbones), 2.6 * len(backbones) + 1.6, 5.2, sharex=True, sharey=True)
    for row, (setting, title) in enumerate(TITLES.items()):
        for column, backbone in enumerate(backbones):
            ax = axes[row, column]
            here = listed[(listed.backbone == backbone) & (listed.setting == setting)]
            for head in here["head"].unique():
                _spectrum(ax, here[here["head"] == head], str(head))
            ax.axvline(-(-listed["rank"].max() // 2), color=colour("gap"), linewidth=0.7, linestyle=":")
            logarithmic(ax, "x")
            logarithmic(ax, "y")
            if row == 0:
                ax.set_title(phase_name(str(backbone)))
            else:
                ax.set_xlabel("rank of the eigenvalue")
        axes[row, 0].set_ylabel(f"{title}\neigenvalue / largest")
    axes[0, 0].legend(frameon=False, fontsize="small", loc="lower left")
    return figure


def _spectrum(ax: Axes, own: pd.DataFrame, head: str) -> None:
    """The ranks at which every seed has an eigenvalue."""
    top = own[own["rank"] == 1].set_index("seed").value
    everywhere = own.groupby("rank").seed.transform("nunique") == own.seed.nunique()
    scaled = own.assign(share=own.value / own.seed.map(top))[everywhere].sort_values("rank")
    mean_and_seeds(ax, scaled, "rank", "share", tint=colour(head), name=label(head))


def conditioning(table: pd.DataFrame) -> Figure:
    """Conditioning over the fraction of training; a row a measure, a column a head that the backbone is trained under."""
    trained = [backbone for backbone in table.backbone.unique() if backbone != UNTRAINED] or [UNTRAINED]
    figure, axes = new_figure(2, len(trained), 3.4 * len(trained) + 1.6, 6.0, sharex=True, sharey="row")
    for row, (measure, title) in enumerate(MEASURES.items()):
        for column, backbone in enumerate(trained):
            ax = axes[row, column]
            here = table[table.backbone.isin((UNTRAINED, backbone))]
            for place, head in enumerate(here["head"].unique()):
                for setting, style in STYLES.items():
                    _over_training(ax, here[here["head"] == head], setting, measure, style, shift=0.012 * (place - 1))
            logarithmic(ax, "y")
            if row == 0:
                ax.set_title(phase_name(str(backbone)))
            else:
                ax.set_xlabel("fraction of training")
        axes[row, 0].set_ylabel(title)
    handles = [axes[0, 0].plot([], [], color=colour(str(h)), label=label(str(h)))[0] for h in table["head"].unique()]
    handles += [axes[0, 0].plot([], [], s, color="#000000", label=TITLES[name])[0] for name, s in STYLES.items()]
    figure.legend(handles=handles, frameon=False, fontsize="small", ncols=len(handles), loc="outside upper center")
    return figure


def _over_training(ax: Axes, own: pd.DataFrame, setting: str, measure: str, style: str, shift: float) -> None:
    """Geometric mean over convolutions and seeds at each moment, with its interval where there is one, a little aside."""
    head, points = str(own["head"].iloc[0]), []
    for moment, now in own.groupby("moment"):
        values = per_seed(now, setting, measure).get(head, pd.Series(dtype=float)).dropna()
        if len(values):
            interval = geometric_interval(values)
            points.append((moment, interval.estimate, interval.low, interval.high))
    if not points:
        return
    x, y, low, high = np.array(points).T
    ax.plot(x + shift, y, style, color=colour(head), marker="o", markersize=3, linewidth=1.4)
    bounded = np.isfinite(high) & (low > 0)
    ax.vlines(x[bounded] + shift, low[bounded], high[bounded], color=colour(head), linewidth=1.0, alpha=0.6)


def fidelity(end: pd.DataFrame) -> Figure:
    """Cosine of K-FAC to the exact GGN block of each convolution; a column a backbone."""
    some = end[(end.measure == "cosine") & (end.setting == BEFORE)]
    backbones, heads = list(end.backbone.unique()), list(end["head"].unique())
    shifts = dict(zip(heads, np.linspace(-0.2, 0.2, len(heads)) if len(heads) > 1 else [0.0], strict=True))
    figure, axes = new_figure(1, len(backbones), 2.6 * len(backbones) + 1.4, 3.2, sharex=True, sharey=True)
    for ax, backbone in zip(axes[0], backbones, strict=True):
        for head in heads:
            own = some[(some.backbone == backbone) & (some["head"] == head)]
            seeds = own.groupby("layer").value.agg(["mean", "min", "max"]).reindex(list(CONVOLUTIONS))
            places = np.arange(len(CONVOLUTIONS)) + shifts[head]
            ax.vlines(places, seeds["min"], seeds["max"], color=colour(head), linewidth=1.2)
            ax.plot(places, seeds["mean"], "o", color=colour(head), markersize=4, label=label(head))
        ax.set_xticks(range(len(CONVOLUTIONS)), [f"{layer}\nconv." for layer in CONVOLUTIONS])
        ax.set_ylim(0, 1.03)
        ax.grid(axis="y", linewidth=0.3)
        ax.set_title(phase_name(str(backbone)))
    axes[0, 0].set_ylabel("cosine of K-FAC to\nthe exact GGN block")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize="small", ncols=len(names), loc="outside upper center")
    return figure
