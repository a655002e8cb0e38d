"""What the landscape study found, computed from ``landscape.csv`` and ``landscape_training.csv``."""

from pathlib import Path

import pandas as pd

from studies.figures import landscape as figures
from studies.figures.style import label
from studies.results import Provenance, read_provenance, read_table
from studies.sections.section import Claim, Picture, Section, Table
from studies.statistics import Comparison, mean_interval, ratio_interval

# The measured lines, "<space> <direction>" as in the table.
LINES = {
    "feature ascent": "features, +g (published)",
    "feature descent": "features, −g",
    "weight step": "weights, optimiser's step",
}
PUBLISHED = "feature ascent"
QUANTITIES = {
    "loss_variation": "loss variation",
    "gradient_distance": "gradient distance",
    "beta": "effective β",
    "relative_gradient_distance": "relative gradient distance",
    "turning": "turning 1 − cos",
}
STATEMENTS = {
    "loss_variation": "The loss of GCP varies less along its gradient than that of GAP (smaller Lipschitzness band).",
    "gradient_distance": "The gradients of GCP are more predictive than those of GAP (smaller ‖g(X + ηg) − g(X)‖).",
    "beta": "The effective β-smoothness constant of GCP is smaller than that of GAP.",
    "relative_gradient_distance": "The same free of the gradient's scale: ‖g(X + ηg) − g(X)‖ / ‖g(X)‖ is smaller under GCP.",
    "turning": "The same for the direction alone: the gradient of GCP turns less (1 − cos).",
}


def by_step(lines: pd.DataFrame) -> pd.DataFrame:
    """One row for each pooling, seed, line and step with the QUANTITIES of that line.

    max L - min L, max ||g(eta) - g||, max beta, max ||g(eta) - g|| / ||g||, max (1 - cos), all over eta.
    """
    table = lines.assign(
        relative_gradient_distance=lines.gradient_distance / lines.gradient_norm, turning=1.0 - lines.cosine
    )
    widths = table.groupby(["pooling", "seed", "space", "direction", "step"], sort=False).agg(
        low=("loss", "min"),
        high=("loss", "max"),
        gradient_distance=("gradient_distance", "max"),
        beta=("beta", "max"),
        relative_gradient_distance=("relative_gradient_distance", "max"),
        turning=("turning", "max"),
    )
    return widths.assign(loss_variation=widths.high - widths.low).reset_index()


def per_seed(widths: pd.DataFrame) -> pd.DataFrame:
    """One row for each pooling, seed and line: geometric means over the measured steps of the QUANTITIES."""
    keys = ["pooling", "seed", "space", "direction"]
    logs = widths[list(QUANTITIES)].clip(lower=1e-12).transform("log")
    return logs.groupby([widths[key] for key in keys], sort=False).mean().transform("exp").reset_index()


def comparisons(summary: pd.DataFrame, reference: str = "gap") -> list[Comparison]:
    """Ratios to the reference head, paired by seed, for every line, quantity and other head; none without reference."""
    if reference not in set(summary.pooling):
        return []
    found = []
    for line in LINES:
        wide = summary[summary.space + " " + summary.direction == line].set_index(["seed", "pooling"])
        for key in QUANTITIES:
            values = wide[key].unstack("pooling")
            for pooling in (p for p in summary.pooling.unique() if p != reference):
                paired = values[[pooling, reference]].dropna()
                found.append(Comparison(pooling, line, key, ratio_interval(paired[pooling], paired[reference])))
    return found


def section(folder: Path) -> Section:
    """The section of the report for the results in `folder`."""
    lines, epochs = read_table(folder, "landscape"), read_table(folder, "landscape_training")
    origin = read_provenance(folder, "landscape")
    widths = by_step(lines)
    compared = {"gap", "gcp"} <= set(lines.pooling)
    found = comparisons(per_seed(widths))
    claims = _claims(found) + _control(per_seed(widths)) if compared else []
    pictures = [
        Picture("landscape", _bands_caption(origin, claims), figures.bands(lines)),
        Picture("landscape_widths", _widths_caption(origin, found), figures.widths(widths)),
        Picture("landscape_training", _training_caption(origin, epochs), figures.training(epochs)),
    ]
    tables = [Table("landscape_accuracy", _scope(origin) + " Mean over seeds with 95 % t interval.", accuracy(epochs))]
    if found:
        pictures.insert(
            2, Picture("landscape_ratios", _ratios_caption(found), figures.ratios(found, LINES, QUANTITIES))
        )
        caption = (
            "Paired ratios to GAP over seeds, of geometric means over the measured steps. Below 1: smoother than GAP."
        )
        tables.insert(0, Table("landscape_summary", caption, _printed(found)))
    return Section(
        title="Landscape: is the loss smoother under GCP?",
        question="Wang et al. (2020) report that the loss of a GCP network varies less along its gradient, and that its "
        "gradients are more predictive, than those of a GAP network.",
        method=_method(origin),
        provenance=origin,
        claims=claims,
        remarks=_remarks(found) if compared else ["Without runs of both GAP and GCP no claim can be judged."],
        pictures=pictures,
        tables=tables,
    )


def accuracy(epochs: pd.DataFrame) -> pd.DataFrame:
    """Results of the last epoch for each head, mean over seeds with interval."""
    last = epochs[epochs.epoch == epochs.epoch.max()]
    rows = []
    for pooling, some in last.groupby("pooling", sort=False):
        rows.append(
            {
                "head": label(str(pooling)),
                "training loss": str(mean_interval(some.train_loss)),
                "test top-1 [%]": str(mean_interval(100 * some.test_top1)),
                "seconds a run": f"{some.seconds.mean():.0f}",
            }
        )
    return pd.DataFrame(rows)


def _claims(found: list[Comparison]) -> list[Claim]:
    """The published claims (GCP on the published line), then the same where training really goes."""
    gcp = [c for c in found if c.pooling == "gcp"]
    published = [c for c in gcp if c.condition == PUBLISHED]
    others = [
        c for c in gcp if c.condition != PUBLISHED and c.quantity in ("loss_variation", "gradient_distance", "beta")
    ]
    return [
        Claim(STATEMENTS[c.quantity], f"GCP / GAP, {QUANTITIES[c.quantity]}, {LINES[c.condition]}", c.interval)
        for c in published + others
    ]


def _control(summary: pd.DataFrame) -> list[Claim]:
    """Is it the root, or do second-order statistics suffice? GCP against covariance pooling without the root."""
    return [
        Claim(
            "Control, not in the paper: with the root the loss varies less along its gradient than without it.",
            f"GCP / covariance, {QUANTITIES[c.quantity]}, {LINES[c.condition]}",
            c.interval,
        )
        for c in comparisons(summary, reference="covariance")
        if (c.pooling, c.condition, c.quantity) == ("gcp", PUBLISHED, "loss_variation")
    ]


def _remarks(found: list[Comparison]) -> list[str]:
    published = {(c.pooling, c.quantity): c for c in found if c.condition == PUBLISHED}
    absolute, relative = published["gcp", "gradient_distance"], published["gcp", "relative_gradient_distance"]
    agree = "agree" if absolute.smaller == relative.smaller else "do not agree"
    return [
        f"The published measures depend on the length of g, which the head itself changes, and the step ηg with it. On the "
        f"published line the gradient distance ({absolute.interval}: {absolute.smaller}) and its scale-free form "
        f"({relative.interval}: {relative.smaller}) {agree}."
    ]


def _method(origin: Provenance) -> str:
    c = origin.config
    return (
        f"{c['backbone']} with the heads {', '.join(label(p) for p in c['poolings'])}, trained by SGD with momentum for "
        f"{c['epochs']} epochs (batch {c['batch_size']}, learning rate {c['learning_rate']}, schedule {c['schedule']}) on "
        f"{origin.data['label']}, {len(origin.seeds)} seeds. For each seed all heads start from the same backbone weights "
        f"and see the same batches. Every {c['measure_every']} steps the loss and its gradient are measured at "
        f"{c['eta_points']} equally spaced points of three lines: η in [{c['eta_low']}, {c['eta_high']}] from the "
        f"activation X after the stem along +g and −g, and [{c['step_low']}, {c['step_high']}] optimiser steps from the "
        f"weights. Batch statistics and dropout masks are those of the training step."
    )


def _scope(origin: Provenance) -> str:
    return f"{origin.data['label']}, {origin.config['backbone']}, n = {len(origin.seeds)} seeds."


def _bands_caption(origin: Provenance, claims: list[Claim]) -> str:
    found = " ".join(f"{c.quantity}: {c.interval}, claim {c.verdict}." for c in claims[:2])
    return (
        f"Bands from the smallest to the largest value over η at each measured step (geometric mean over seeds of both "
        f"edges). {_scope(origin)} {found}"
    )


def _widths_caption(origin: Provenance, found: list[Comparison]) -> str:
    gcp = [c for c in found if c.pooling == "gcp" and c.quantity == "loss_variation"]
    words = "; ".join(f"{LINES[c.condition]} {c.interval}" for c in gcp)
    return (
        f"Width of the bands along all three lines, geometric mean over seeds with 95 % interval. {_scope(origin)}"
        + (f" Loss variation of GCP relative to GAP: {words}." if words else "")
    )


def _training_caption(origin: Provenance, epochs: pd.DataFrame) -> str:
    last = epochs[epochs.epoch == epochs.epoch.max()].groupby("pooling", sort=False).test_top1.mean()
    found = ", ".join(f"{label(str(pooling))} {100 * value:.1f} %" for pooling, value in last.items())
    return (
        f"The same runs: training loss and test error, geometric mean over seeds with 95 % interval. {_scope(origin)} "
        f"Test top-1 after the last epoch: {found}."
    )


def _ratios_caption(found: list[Comparison]) -> str:
    words = [c.smaller for c in found if c.pooling == "gcp"]
    counts = ", ".join(f"{words.count(w)} {w}" for w in dict.fromkeys(words))
    return (
        f"All comparisons with GAP. Of GCP's {len(words)} ratios, taken as claims of being below 1: {counts or 'none'}."
    )


def _printed(found: list[Comparison]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "head": label(c.pooling),
            "line": LINES[c.condition],
            "quantity": QUANTITIES[c.quantity],
            "ratio to GAP": f"{c.interval.estimate:.3g}",
            "95 % interval": f"[{c.interval.low:.3g}, {c.interval.high:.3g}]",
            "n": c.interval.n,
            "smoother than GAP": c.smaller,
        }
        for c in found
    )
