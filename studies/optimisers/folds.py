"""What the page shows of the optimiser study."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from studies.draw import LABELS, Curves
from studies.engine.plan import SMOOTHED
from studies.engine.study import Results
from studies.judge import Claim, Judged
from studies.optimisers import claims
from studies.optimisers.autoencoder import ARMS
from studies.optimisers.claims import (
    KEYS,
    OF_SGD,
    PERIOD,
    at_levels,
    final,
    reported,
    seconds_to_targets,
    targets,
    to_targets,
)
from studies.optimisers.problems import MILLISECONDS, PEAK, PRIMARY, STATE
from studies.optimisers.tuning import STARTS
from studies.page import Fold, Picture, Table
from studies.statistics import geometric_interval, mean_interval, ratio_interval

LEVELS = 25
"""Losses at which the interaction is drawn."""
WORDS = LABELS | {"": "autoencoder", "kfac_quadratic": "K-FAC, quadratic model"}
CELL = ["head", "optimizer"]
LATER = "later steps, of SGD's"


def folds(results: Results) -> Sequence[Fold]:
    """The claim; the other optimisers; the autoencoder; and, on the page of costs, what a step takes."""
    return [_claim(results), _others(results), *_deep(results), _costs(results)]


def _claim(results: Results) -> Fold:
    records, settings, judged = results.records, results.origins.settings, results.of("second order superfluous")
    steps = to_targets(records).groupby(["optimizer", "head"]).value.agg(lambda values: np.exp(np.log(values).mean()))
    words = "; ".join(
        f"{WORDS[o]} {steps[o, 'gap']:.3g} under GAP, {steps[o, 'gcp']:.3g} under GCP" for o in ("sgd", "kfac")
    )
    shares = " and ".join(f"{steps['kfac', h] / steps['sgd', h]:.0%} under {h.upper()}" for h in PRIMARY).replace(
        "%", " %"
    )
    tuned = tuning_table(records)
    where = ", ".join(f"{row.optimiser} ({row.problem})" for row in tuned[tuned.edge].itertuples())
    edge = f"at an edge of what was tried: {where}" if where else "no chosen setting lies at an edge of what was tried"
    shown = tuned.assign(values=tuned["values"] + " (" + tuned.trials.astype(str) + ")")
    chosen = shown.pivot(index=["optimiser", "tuned"], columns="problem", values="values").fillna("").reset_index()
    return Fold(
        judged=judged,
        sentences=[
            f"K-FAC reaches the targets in {shares} of the steps that SGD takes.",
            *_not_by_the_root(results, judged),
            f"Tuned with {tuned.trials.min()} to {tuned.trials.max()} trials each; {edge}.",
        ],
        pictures=[
            *_interaction(interactions(records), judged),
            _losses(records, "optimisers_loss", settings["optimizers"], f"Steps to the targets: {words}."),
        ],
        controls=results.of(*(claim.name for claim in claims.CONTROLS)),
        exploratory=_measured(results, claims.FURTHER),
        tables=[Table("optimisers_tuning", "Tuned settings, and the number of trials.", chosen)],
        method=_method(results),
        provenance=results.provenance,
    )


def _not_by_the_root(results: Results, judged: Sequence[Judged]) -> list[str]:
    """Where K-FAC speeds up GCP less than GAP: the controls that it speeds up less still, all of the interval on that side."""
    if not any(case.outcome == "supported" for case in judged):
        return []
    less = [
        WORDS[to]
        for (of, to), control in zip(claims.CONTRASTS, claims.CONTROLS, strict=True)
        for case in results.of(control.name)
        if of == "gcp" and case.estimate is not None and case.estimate.low > 0
    ]
    return [f"It speeds up {' and '.join(less)} less still: the effect does not need the root."] if less else []


def _measured(results: Results, asked: Sequence[Claim]) -> list[Judged]:
    return [case for case in results.of(*(claim.name for claim in asked)) if case.estimate is not None]


def interactions(records: pd.DataFrame) -> pd.DataFrame:
    """K-FAC's interaction of each head with GAP at losses that all runs of the factorial reach: head, seed, level, value."""
    curves = reported(records)
    curves = curves[curves.optimizer.isin(("sgd", "kfac"))]
    runs = curves[curves.quantity == SMOOTHED].sort_values("step").groupby(KEYS).value
    high, low = 0.9 * runs.first().min(), 1.001 * runs.min().max()
    if not low < high:
        return pd.DataFrame(columns=["head", "seed", "level", "value"])
    table = at_levels(curves, np.geomspace(high, low, LEVELS).tolist())
    logs = table.assign(value=np.log(table.value)).pivot(
        index=["seed", "level"], columns=["optimizer", "head"], values="value"
    )
    speed_up = logs["sgd"] - logs["kfac"]
    against = speed_up.drop(columns="gap").sub(speed_up["gap"], axis=0)
    return against.melt(ignore_index=False, var_name="head").dropna().reset_index()


def _interaction(levels: pd.DataFrame, judged: Sequence[Judged]) -> list[Picture]:
    """The interaction at all levels, of the controls only where there is an effect to explain; none without levels."""
    of_gcp = levels[levels["head"] == "gcp"]
    if not any(case.outcome in ("supported", "contradicted") for case in judged):
        levels = of_gcp
    if levels.empty:
        return []
    gcp = [mean_interval(values) for _, values in of_gcp.groupby("level").value]
    below, above = sum(i.high < 0 for i in gcp), sum(i.low > 0 for i in gcp)
    last, first = (f"{gcp[place].estimate:+.2f}".replace("-", "−") for place in (0, -1))
    words = (
        f"From target {levels.level.max():.2g} to {levels.level.min():.2g}, which all runs reach, the interaction goes from "
        f"{first} to {last}; its 95 % interval is below 0 at {below} and above 0 at {above} of {len(gcp)} targets. Below 0 K-FAC "
        "helps less than under GAP; grey: the margin."
    )
    x, y = "target: training loss", "log speed-up by K-FAC, head − GAP"
    drawing = Curves("level", "value", x_label=x, y_label=y, log="x", reference=0.0, zone=(-0.1, 0.1))
    return [Picture("optimisers_interaction", words, drawing.draw(levels))]


def _losses(records: pd.DataFrame, name: str, optimizers: Sequence[str], words: str) -> Picture:
    """The loss curves of some optimisers under GAP and GCP; the targets in grey."""
    curves = reported(records)
    curves = curves[(curves.quantity == SMOOTHED) & curves["head"].isin(PRIMARY) & curves.optimizer.isin(optimizers)]
    curves = curves.sort_values("optimizer", key=lambda column: column.map([*optimizers].index), kind="stable")
    zone = (min(targets(records)), max(targets(records)))
    drawing = Curves(
        "step", "value", "optimizer", "head", y_label="training loss", mean="geometric", log="y", zone=zone
    )
    return Picture(name, f"{words} Mean loss of the last half epoch; grey: the targets.", drawing.draw(curves))


def tuning_table(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each search: problem, optimiser, names of the tuned settings, chosen values, trials, edge (of what was tried)."""
    # a search that was computed again on another machine, whose last digits differ, counts once
    trials = records[records.layer == "trial"].drop_duplicates([*CELL, "quantity", "index"])
    rows = []
    for (head, optimizer), part in trials.groupby(CELL, sort=False):
        best = part[part["index"] == 0].set_index("quantity").value.drop("loss")
        rows.append({
            "problem": WORDS.get(str(head), head),
            "optimiser": WORDS.get(str(optimizer), optimizer),
            "tuned": ", ".join(map(str, best.index)).replace("_", " "),
            "values": ", ".join(f"{value:g}" for value in best),
            "trials": int((part.quantity == "loss").sum()),
            "edge": bool(part[part.quantity == "edge"].value.any()),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _others(results: Results) -> Fold:
    """All optimisers under GAP and GCP."""
    records, settings = results.records, results.origins.settings
    few = records["head"].isin(PRIMARY) & (records.seed < settings["other_seeds"])
    few = records[few | records.quantity.isin((claims.TARGET, OF_SGD))]
    table = summary(few)
    best = table.sort_values("_loss").drop_duplicates("head")
    words = ", ".join(f"{row.optimiser} under {row.head}" for row in best.itertuples())
    optimizers = [*settings["optimizers"], *settings["others"]]
    caption = (
        "Means over seeds after the last epoch, of the loss with 95 % interval; steps to the targets, and the seconds that "
        "these steps take (timed apart from training, see costs), in those of SGD. ≥: not reached in some seeds, counted with "
        "a step more than a run."
    )
    return Fold(
        title="K-FAC and other optimisers against tuned SGD",
        pictures=[_losses(few, "optimisers_all", optimizers, f"Lowest final training loss: {words}.")],
        tables=[Table("optimisers_summary", caption, table.drop(columns="_loss"))],
        method=[f"Tuned and trained as for claim 6; of every optimiser the first {settings['other_seeds']} seeds."],
    )


def summary(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each head and optimiser: final loss and accuracy, steps and seconds to the targets; _loss orders them."""
    spent = seconds_to_targets(records).rename(columns={"value": "seconds"}).drop(columns="censored")
    spent = to_targets(records).rename(columns={"value": "steps"}).merge(spent, on=KEYS)
    of_sgd = spent[spent.optimizer == "sgd"].drop(columns=["optimizer", "censored"])
    runs = final(records, "train_loss").merge(final(records, "test_top1"), on=KEYS, suffixes=("", "_top1"))
    runs = runs.merge(spent, on=KEYS).merge(of_sgd, on=["network", "head", "seed"], suffixes=("", "_sgd"))
    rows: list[dict[str, Any]] = []
    for (head, optimizer), run in runs.groupby(CELL, sort=False):
        steps, seconds = (ratio_interval(run[of], run[f"{of}_sgd"]).estimate for of in ("steps", "seconds"))
        bound = "≥ " if run.censored.any() else ""
        rows.append({
            "head": WORDS[str(head)],
            "optimiser": WORDS[str(optimizer)],
            "training loss": geometric_interval(run.value).short if np.isfinite(run.value).all() else "diverged",
            "test top-1 [%]": 100 * run.value_top1.mean(),
            "steps to the targets": f"{bound}{steps:.2f}",
            "seconds to the targets": f"{bound}{seconds:.2f}",
            "_loss": run.value.mean(),
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values(["head", "_loss"], ignore_index=True)


def _deep(results: Results) -> list[Fold]:
    """The autoencoder, where there is one."""
    runs = claims.autoencoders(results.records)
    if runs.empty:
        return []
    settings = results.origins.settings["autoencoder"]
    ends = runs.groupby(["optimizer", "seed"], sort=False).last().groupby("optimizer")[["step", "value"]].mean()
    words = "; ".join(f"{WORDS[str(arm)]} {row.value:.4g} after {row.step:.0f} updates" for arm, row in ends.iterrows())
    drawing = Curves(
        "step", "value", "optimizer", x_label="update", y_label="loss of an image", log="xy", mean="geometric"
    )
    shown = runs[runs.step > 0].replace({"optimizer": {"kfac_quadratic": WORDS["kfac_quadratic"]}})
    return [
        Fold(
            title="The deep autoencoder: K-FAC with a tenth of SGD's updates",
            pictures=[Picture("optimisers_autoencoder", f"Final training loss: {words}.", drawing.draw(shown))],
            exploratory=_measured(results, claims.DEEP_CLAIMS),
            method=[
                f"Encoder {'-'.join(map(str, settings['widths']))} on {settings['image_size']}×{settings['image_size']} grey "
                f"pixels ({settings['dataset']}), {settings['activation']}, {settings['initialisation']} initialisation, batches "
                f"of {settings['batch_size']}; SGD takes {settings['updates']} updates, K-FAC {ARMS['kfac'].share:g} times as "
                "many, each with a cosine schedule of its length. Loss: cross-entropy summed over pixels. Compared are the "
                "updates to the loss that SGD ends at on the same seed; Martens & Grosse (2015) claim about a tenth. Tuned as "
                "for claim 6."
            ],
        )
    ]


def _costs(results: Results) -> Fold:
    """What a step costs, on the page of costs."""
    quantities = [MILLISECONDS, OF_SGD, LATER, PEAK, STATE]
    part = results.records[results.records.quantity.isin(quantities)].replace({"head": WORDS, "optimizer": WORDS})
    part = part.rename(columns={"head": "problem", "optimizer": "optimiser"})
    late = part[(part.quantity == OF_SGD) & (part["index"] >= part["index"].max() + 1 - PERIOD)]
    part = pd.concat([part, late.assign(quantity=LATER)])
    table = part.pivot_table(index=["problem", "optimiser"], columns="quantity", values="value", sort=False)
    longest = table[OF_SGD].sort_values().reset_index().iloc[-1]
    words = f"The longest is that of {longest.optimiser} ({longest.problem}): {longest[OF_SGD]:.3g} times SGD's."
    caption = (
        "Means over the timed steps; each is divided by the SGD step that was timed next to it, and so are the last "
        f"{PERIOD}, which stand for all later ones: while K-FAC warms up, most of its steps renew the factors. Peak memory "
        "beyond weights and state, in a step that does."
    )
    steps = results.origins.settings["timing_steps"]
    return Fold(
        title="What a training step of each optimiser costs",
        sentences=[words],
        tables=[Table("optimisers_costs", caption, table[quantities].reset_index())],
        method=[f"The first {steps} steps, each next to one of SGD, in one process."],
        provenance=results.provenance,
        page="performance",
    )


def _method(results: Results) -> list[str]:
    settings = results.origins.settings
    training, start = settings["training"], len(STARTS[settings["start"]])
    label, aims = results.origins.data.get("label", training["dataset"]), targets(results.records)
    return [
        f"{training['network']} on {label}, {training['epochs']} epochs of batches of {training['batch_size']}, schedule "
        f"{training['schedule']}. Within a seed all optimisers start from the same weights and see the same batches. Steps are "
        "those until the mean training loss of the last half epoch is at most "
        f"{', '.join(f'{target:g}' for target in aims)}, fixed beforehand; their geometric mean is compared.",
        f"Tuning, the same for all: {start} settings around a centre, of the learning rate (over 1 − momentum where there is "
        "heavy-ball momentum) and a second setting; then the untried neighbours of the best, until there are none. A trial has "
        f"{settings['trial_epochs'] or training['epochs']} epochs and {settings['tuning_seeds']} seed(s) that are not reported; "
        "the training loss of its last epoch decides.",
    ]
