"""Figures of the optimiser study, from ``optimisers_curves.csv`` and the tables beside it."""

from typing import Protocol

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.report.style import label, logarithmic, new_figure

TINTS = {
    "sgd": "#555555",
    "adamw": "#E69F00",
    "kfac": "#0072B2",
    "ekfac": "#56B4E9",
    "kfac_quadratic": "#D55E00",
    "soap": "#009E73",
    "shampoo": "#CC79A7",
    "muon": "#D55E00",
    "singd": "#A0A030",
}
NAMES = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "kfac": "K-FAC",
    "ekfac": "EKFAC",
    "kfac_quadratic": "K-FAC, quadratic",
    "soap": "SOAP",
    "shampoo": "Shampoo",
    "muon": "Muon",
    "singd": "SINGD",
}
PARTS = {
    "forward and backward": "#BBBBBB",
    "curvature": "#0072B2",
    "factors": "#56B4E9",
    "inverses": "#D55E00",
    "preconditioning": "#E69F00",
    "update": "#009E73",
    "optimiser's step": "#CC79A7",
}


class Seconds(Protocol):
    """What tells how long an arm's steps take."""

    def seconds(self, problem: str, arm: str, steps: float) -> float:
        """Seconds of the first `steps` steps."""


def tint(arm: str) -> str:
    """The colour of an arm."""
    return TINTS.get(arm, "#000000")


def curves(table: pd.DataFrame, clock: Seconds, seeds: bool = False) -> Figure:
    """Loss over steps (left) and over seconds (right), one row for each problem; geometric mean over seeds."""
    problems = list(table.problem.unique())
    figure, axes = new_figure(len(problems), 2, 9.0, 0.7 + 2.8 * len(problems), sharey="row")
    for row, problem in enumerate(problems):
        some = table[(table.problem == problem) & np.isfinite(table.loss) & (table.step > 0)]
        for arm in some.arm.unique():
            own = some[some.arm == arm]
            mean = own.assign(log=np.log(own.loss)).groupby("step").log.mean().transform(np.exp)
            _lines(axes[row, 0], mean.index.to_numpy(float), mean.to_numpy(), arm)
            seconds = np.array([clock.seconds(problem, arm, s) for s in mean.index])
            _lines(axes[row, 1], seconds, mean.to_numpy(), arm)
            for _, run in own.groupby("seed") if seeds else ():
                axes[row, 0].plot(run.step, run.loss, color=tint(arm), linewidth=0.5, alpha=0.6)
        axes[row, 0].set_ylabel(f"{label(problem)}\ntraining loss" if len(problems) > 1 else "training loss")
        for ax, words in zip(axes[row], ("step", "seconds"), strict=True):
            logarithmic(ax, "y")
            if seeds:
                logarithmic(ax, "x")
            if row == len(problems) - 1:
                ax.set_xlabel(words)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize="small", ncols=len(names), loc="outside upper center")
    return figure


def _lines(ax: Axes, x: np.ndarray, y: np.ndarray, arm: str) -> None:
    thick = 1.8 if arm in ("sgd", "kfac") else 1.1
    ax.plot(x, y, color=tint(arm), linewidth=thick, label=NAMES.get(arm, arm))


def sensitivity(table: pd.DataFrame) -> Figure:
    """Training loss by damping (rows) and learning rate (columns), a map for each problem, the best in bold."""
    problems = list(table.problem.unique())
    figure, axes = new_figure(1, len(problems), 3.6 * len(problems) + 0.6, 3.2)
    for ax, problem in zip(axes[0], problems, strict=True):
        grid = table[table.problem == problem].pivot(index="damping", columns="learning_rate", values="train_loss")
        losses = np.ma.masked_invalid(np.log(grid.to_numpy()))
        lowest = float(losses.min())
        ax.imshow(losses, cmap="GnBu_r", aspect="auto", origin="lower", vmin=lowest - 1.5, vmax=lowest + np.log(30))
        ax.set_facecolor("#CCCCCC")
        for row, column in np.ndindex(losses.shape):
            value = grid.to_numpy()[row, column]
            best = value == np.nanmin(grid.to_numpy())
            words = f"{value:.3g}" if np.isfinite(value) else "diverged"
            ax.text(
                column,
                row,
                words,
                ha="center",
                va="center",
                fontsize=8,
                color="black",
                weight="bold" if best else "normal",
            )
        ax.set_xticks(range(grid.shape[1]), [f"{v:g}" for v in grid.columns])
        ax.set_yticks(range(grid.shape[0]), [f"{v:g}" for v in grid.index])
        ax.set_xlabel("learning rate")
        ax.set_title(label(problem))
    axes[0, 0].set_ylabel("damping")
    return figure


def breakdown(parts: pd.DataFrame) -> Figure:
    """Milliseconds of a step by part, a bar for each arm, one panel for each problem."""
    problems = list(parts.problem.unique())
    figure, axes = new_figure(1, len(problems), 3.4 * len(problems), 1.4 + 0.3 * parts.arm.nunique())
    for ax, problem in zip(axes[0], problems, strict=True):
        grid = parts[parts.problem == problem].pivot_table(
            index="arm", columns="part", values="milliseconds", sort=False
        )
        grid = grid.fillna(0.0)
        left = np.zeros(len(grid))
        for part in [p for p in PARTS if p in grid] + [p for p in grid if p not in PARTS]:
            ax.barh(range(len(grid)), grid[part], left=left, color=PARTS.get(part, "#000000"), label=part)
            left = left + grid[part].to_numpy()
        ax.set_yticks(range(len(grid)), [NAMES.get(arm, arm) for arm in grid.index])
        ax.invert_yaxis()
        ax.set_xlabel("milliseconds a step")
        ax.set_title(label(problem))
    found = {name: handle for ax in axes[0] for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), frameon=False, fontsize="small", ncols=4, loc="outside lower center")
    return figure
