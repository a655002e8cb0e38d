"""Figures of the curvature study, from ``curvature.csv`` and ``curvature_spectra.csv``."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies.curvature.measures import APPROXIMATIONS
from studies.report.style import colour, label, logarithmic, mean_and_seeds, new_figure
from studies.statistics import Comparison

SHOWN_PHASES = {"initial": "same initial weights", "trained": "after training"}
ALONG = {
    ("GGN", "largest"): "largest GGN eigenvalue",
    ("GGN", "half_rank_condition"): "λ₁ / λₖ at half of\nthe possible rank",
    ("GGN to Hessian", "relative_difference"): "‖H − G‖ / ‖H‖",
    ("K-FAC (expand)", "cosine"): "cosine of K-FAC (expand)",
}
BLOCKS = ("first", "middle", "last", "classifier", "whole")


def spectra(table: pd.DataFrame) -> Figure:
    """GGN eigenvalues of the last convolution over their rank, relative to the largest; a row a phase, a column a backbone."""
    some = table[(table.matrix == "GGN") & (table.block == "last")]
    backbones = list(some.backbone.unique())
    figure, axes = new_figure(2, len(backbones), 2.9 * len(backbones) + 1.6, 5.4, sharex="col", sharey=True)
    for row, (phase, title) in enumerate(SHOWN_PHASES.items()):
        for column, backbone in enumerate(backbones):
            ax = axes[row, column]
            here = some[(some.phase == phase) & (some.backbone == backbone)]
            for pooling in here.pooling.unique():
                own = here[here.pooling == pooling]
                top = own[own["rank"] == 1].set_index("seed").value
                seeds = own.groupby("rank").seed.transform("nunique")
                scaled = own.assign(share=own.value / own.seed.map(top))[seeds == own.seed.nunique()]
                mean_and_seeds(ax, scaled, "rank", "share", tint=colour(pooling), name=label(pooling))
            logarithmic(ax, "y")
            logarithmic(ax, "x")
            if row == 0:
                ax.set_title(backbone)
            else:
                ax.set_xlabel("rank of the eigenvalue")
        axes[row, 0].set_ylabel(f"{title}\neigenvalue / largest")
    axes[0, 0].legend(frameon=False, fontsize="small")
    return figure


def hessians(table: pd.DataFrame) -> Figure | None:
    """All eigenvalues of dense Hessians of all parameters, in descending order; a column a phase; None without any."""
    some = table[(table.matrix == "Hessian") & (table.block == "whole")]
    if some.empty:
        return None
    figure, axes = new_figure(1, 2, 9.0, 3.4, sharey=True)
    smallest = float(some.value.abs().max()) * 1e-4
    for ax, (phase, title) in zip(axes[0], SHOWN_PHASES.items(), strict=True):
        here = some[some.phase == phase]
        for _, own in here.groupby(["pooling", "seed"], sort=False):
            pooling = str(own.pooling.iloc[0])
            name = label(pooling) if own.seed.iloc[0] == here.seed.min() else None
            ax.plot(
                (own["rank"] - 1) / (own["rank"].max() - 1), own.value, color=colour(pooling), linewidth=0.9, label=name
            )
        ax.set_yscale("symlog", linthresh=smallest)
        ax.axhline(0.0, color=colour("gap"), linewidth=0.6)
        ax.set_title(f"{some.backbone.iloc[0]}, {title}")
        ax.set_xlabel("rank / number of parameters")
    axes[0, 0].set_ylabel("Hessian eigenvalue")
    axes[0, 0].legend(frameon=False, fontsize="small")
    return figure


def along_training(table: pd.DataFrame) -> Figure:
    """Curvature of the last convolution over training steps; a row a quantity, a column a backbone."""
    some = table[(table.block == "last") & table.phase.isin(("initial", "training", "trained"))]
    backbones = list(some.backbone.unique())
    figure, axes = new_figure(len(ALONG), len(backbones), 2.9 * len(backbones) + 1.6, 7.6, sharex="col", sharey="row")
    for row, ((matrix, measure), title) in enumerate(ALONG.items()):
        for column, backbone in enumerate(backbones):
            ax = axes[row, column]
            here = some[(some.matrix == matrix) & (some.measure == measure) & (some.backbone == backbone)]
            for pooling in here.pooling.unique():
                own = here[here.pooling == pooling].sort_values("step")
                mean_and_seeds(ax, own, "step", "value", tint=colour(pooling), name=label(pooling))
            if matrix == "GGN":
                logarithmic(ax, "y")
            if row == 0:
                ax.set_title(backbone)
            if row == len(ALONG) - 1:
                ax.set_xlabel("training step")
        axes[row, 0].set_ylabel(title)
    axes[0, 0].legend(frameon=False, fontsize="small")
    return figure


def fidelity(table: pd.DataFrame) -> Figure:
    """Cosine of approximate to exact GGN blocks after training; a row an approximation, a column a backbone."""
    some = table[(table.measure == "cosine") & (table.phase == "trained")]
    backbones = list(some.backbone.unique())
    heads = list(some.pooling.unique())
    shifts = dict(zip(heads, np.linspace(-0.24, 0.24, len(heads)) if len(heads) > 1 else [0.0], strict=True))
    figure, axes = new_figure(
        len(APPROXIMATIONS), len(backbones), 2.9 * len(backbones) + 1.6, 7.6, sharex="col", sharey=True
    )
    for row, name in enumerate(APPROXIMATIONS.values()):
        for column, backbone in enumerate(backbones):
            ax = axes[row, column]
            here = some[(some.matrix == name) & (some.backbone == backbone)]
            blocks = [block for block in BLOCKS if block in set(here.block)]
            for pooling in heads:
                seeds = here[here.pooling == pooling].groupby("block").value.agg(["mean", "min", "max"]).reindex(blocks)
                places = np.arange(len(blocks)) + shifts[pooling]
                ax.vlines(places, seeds["min"], seeds["max"], color=colour(pooling), linewidth=1.2)
                ax.plot(places, seeds["mean"], "o", color=colour(pooling), markersize=4, label=label(pooling))
            ax.set_xticks(range(len(blocks)), blocks)
            ax.set_ylim(0, 1.03)
            ax.grid(axis="y", linewidth=0.3)
            if row == 0:
                ax.set_title(backbone)
        axes[row, 0].set_ylabel(f"cosine of\n{name}")
    handles, names = axes[0, 0].get_legend_handles_labels()
    columns = min(len(names), 2 * len(backbones))  # a narrow figure has no room for all beside one another
    figure.legend(handles, names, frameon=False, fontsize="small", ncols=columns, loc="outside upper center")
    return figure


def ratios(
    comparisons: Sequence[Comparison],
    backbones: Sequence[str],
    phases: Mapping[str, str],
    quantities: Mapping[str, str],
) -> Figure:
    """Every head relative to GAP with its interval; a row a backbone, a column a phase."""
    heads = list(dict.fromkeys(c.pooling for c in comparisons))
    size = (2.9 * len(phases) + 1.8, (0.6 + 0.32 * len(quantities)) * len(backbones) + 0.8)
    figure, axes = new_figure(len(backbones), len(phases), *size, sharey=True, sharex=True)
    shifts = dict(zip(heads, np.linspace(-0.22, 0.22, len(heads)) if len(heads) > 1 else [0.0], strict=True))
    for row, backbone in enumerate(backbones):
        for column, (phase, title) in enumerate(phases.items()):
            ax = axes[row, column]
            here = [c for c in comparisons if c.condition == f"{backbone} {phase}"]
            for one in here:
                height = list(quantities).index(one.quantity) + shifts[one.pooling]
                interval = one.interval
                ax.plot([interval.estimate], [height], "o", color=colour(one.pooling), markersize=3.5)
                if np.isfinite([interval.low, interval.high]).all():
                    ax.plot([interval.low, interval.high], [height] * 2, color=colour(one.pooling), linewidth=1.4)
            ax.axvline(1.0, color=colour("gap"), linewidth=1.0, linestyle="--")
            if not here:
                ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=colour("gap"))
            if row == 0:
                ax.set_title(title)
        axes[row, 0].set_ylabel(backbone)
    axes[0, 0].set_yticks(range(len(quantities)), list(quantities.values()))
    axes[0, 0].invert_yaxis()
    for ax in axes.flat:
        logarithmic(ax, "x")
    for pooling in heads:
        axes[0, 0].plot([], [], "o-", color=colour(pooling), markersize=3.5, label=label(pooling))
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize="small", ncols=len(names), loc="outside upper center")
    figure.supxlabel("ratio to GAP, geometric mean over seeds with 95 % interval", fontsize=9)
    return figure
