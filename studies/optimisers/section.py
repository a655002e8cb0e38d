"""What the optimiser study found, computed from ``optimisers.csv`` and the tables beside it."""

import math
from pathlib import Path

import pandas as pd

from studies.optimisers import figures
from studies.optimisers.autoencoder import ARMS as DEEP_ARMS
from studies.optimisers.autoencoder import PROBLEM as DEEP
from studies.optimisers.measures import (
    EARLY,
    REFERENCE,
    Clock,
    accuracy_difference,
    at_the_end,
    final_ratio,
    reached,
    steps_ratio,
)
from studies.optimisers.runs import in_words, tuning_of
from studies.optimisers.settings import ARMS
from studies.report.section import Claim, Picture, Section, Table
from studies.report.style import label
from studies.results import Provenance, read_provenance, read_table
from studies.statistics import Interval, mean_interval

COLUMNS = ("problem", "arm", "seed", "epoch", "step", "train_loss", "test_top1", "seconds")
KEYS = ("problem", "arm")
BAR, BEYOND = "bar", "beyond the bar"
JUDGED = ("kfac", "ekfac")
DEEP_BAR = ("kfac", "kfac_quadratic")
UPDATES, TIME, MARGIN = 0.1, 0.5, -1.0
"""The bars: at most a tenth of the updates, half of the time; accuracy at most a point below."""


def name(arm: str) -> str:
    """The name of an arm for a reader."""
    return ARMS[arm].label if arm in ARMS else DEEP_ARMS[arm].label


def section(folder: Path) -> Section:
    """The section of the report for the results in `folder`."""
    epochs = read_table(folder, "optimisers", COLUMNS)
    curves = read_table(folder, "optimisers_curves", (*KEYS, "seed", "step", "loss"))
    costs = read_table(folder, "optimisers_costs", (*KEYS, "step", "milliseconds", "peak_mib", "state_mib"))
    parts = read_table(folder, "optimisers_breakdown", (*KEYS, "part", "milliseconds"))
    trials = read_table(
        folder, "optimisers_trials", (*KEYS, "trial", "first_parameter", "first_value", "train_loss", "chosen")
    )
    origin = read_provenance(folder, "optimisers")
    targets, clock = reached(curves), Clock(costs)
    claims = _claims(epochs, targets, clock)
    return Section(
        title="Optimisers: does K-FAC train faster than tuned SGD?",
        question="K-FAC with its default damping, tuned in what SGD is tuned in, against SGD with momentum and other optimisers.",
        method=_method(origin),
        provenance=origin,
        claims=claims,
        remarks=_remarks(trials, targets, claims),
        pictures=_pictures(folder, origin, curves, parts, clock),
        tables=[
            Table(
                "optimisers_summary",
                "Tuned settings, results after the last epoch (mean over seeds with 95 % interval) and costs in those of SGD. "
                "Steps and seconds are to the training loss that SGD ends at on the same seed, and seconds those of the "
                "interleaved timing; ≥: in some seeds not reached, then one more than the steps of the whole run count.",
                summary(epochs, targets, clock, costs, trials),
            ),
            Table("optimisers_deep_summary", _deep_caption(origin), deep_summary(curves, targets, clock, trials)),
        ],
    )


def _claims(epochs: pd.DataFrame, targets: pd.DataFrame, clock: Clock) -> list[Claim]:
    claims = []
    arms = [arm for arm in JUDGED if arm in set(epochs.arm)]
    for arm in arms:
        group = BAR if arm == "kfac" else BEYOND
        for problem in epochs.problem.unique():
            claims += _network_claims(epochs, targets, clock, arm, problem, group)
    for arm in (a for a in targets[targets.problem == DEEP].arm.unique() if a != REFERENCE):
        group = BAR if arm in DEEP_BAR else BEYOND
        for what, ratio, least, words in (
            ("updates", steps_ratio(targets, DEEP, arm, "final"), UPDATES, "at least 10 times fewer updates"),
            ("seconds", steps_ratio(targets, DEEP, arm, "final", clock), TIME, "at least 2 times less time"),
        ):
            statement = f"Autoencoder: {name(arm)} needs {words} than tuned SGD to the same training loss."
            quantity = f"{what}, {name(arm)} / SGD"
            claims.append(Claim(statement, quantity, ratio.interval, "below", math.nextafter(least, 1), group))
    return claims


def _network_claims(
    epochs: pd.DataFrame, targets: pd.DataFrame, clock: Clock, arm: str, problem: str, group: str
) -> list[Claim]:
    at, own = label(problem), name(arm)
    steps, seconds = steps_ratio(targets, problem, arm, "final"), steps_ratio(targets, problem, arm, "final", clock)
    loss, accuracy = final_ratio(epochs, problem, arm), accuracy_difference(epochs, problem, arm)
    rows = [
        (f"per epoch {own} with default damping is ahead of tuned SGD.", "training loss after the same epochs", loss),
        (f"{own} needs fewer steps to the loss that SGD ends at.", "steps", steps.interval),
        (
            f"per second {own} with default damping is at least level with tuned SGD.",
            "seconds to that loss",
            seconds.interval,
        ),
    ]
    claims = [Claim(f"{at}: {words}", f"{what}, {own} / SGD", interval, group=group) for words, what, interval in rows]
    statement = f"{at}: the final accuracy of {own} is not below that of SGD by more than a point."
    quantity = "test accuracy minus that of SGD, points"
    return [*claims, Claim(statement, quantity, accuracy, "above", MARGIN, group)]


def summary(
    epochs: pd.DataFrame, targets: pd.DataFrame, clock: Clock, costs: pd.DataFrame, trials: pd.DataFrame
) -> pd.DataFrame:
    """One row for each head and arm."""
    rows = []
    for problem in epochs.problem.unique():
        losses, accuracies = (at_the_end(epochs, problem, c) for c in ("train_loss", "test_top1"))
        for arm in epochs[epochs.problem == problem].arm.unique():
            memory = costs[(costs.problem == problem) & (costs.arm == arm)].iloc[0]
            ratios = {
                "steps to SGD's loss": steps_ratio(targets, problem, arm, "final"),
                f"steps to its loss at {EARLY:.0%} of the steps": steps_ratio(targets, problem, arm, "early"),
                "seconds to SGD's loss": steps_ratio(targets, problem, arm, "final", clock),
            }
            rows.append(
                {
                    "head": label(problem),
                    "optimiser": name(arm),
                    "tuned": _tuned(trials, problem, arm),
                    "training loss": mean_interval(losses[arm]).short,
                    "test top-1 [%]": mean_interval(100 * accuracies[arm]).short,
                    "time of a step": clock.step_ratio(problem, arm),
                    **{words: _at_least(ratio.interval, ratio.censored) for words, ratio in ratios.items()},
                    "peak of a step [MiB]": memory.peak_mib,
                    "state [MiB]": memory.state_mib,
                }
            )
    return pd.DataFrame(rows)


def deep_summary(curves: pd.DataFrame, targets: pd.DataFrame, clock: Clock, trials: pd.DataFrame) -> pd.DataFrame:
    """One row for each arm of the autoencoder."""
    own = curves[curves.problem == DEEP]
    rows = []
    for arm in own.arm.unique():
        run = own[own.arm == arm]
        updates, seconds = steps_ratio(targets, DEEP, arm, "final"), steps_ratio(targets, DEEP, arm, "final", clock)
        rows.append(
            {
                "optimiser": name(arm),
                "tuned": _tuned(trials, DEEP, arm),
                "updates": int(run.step.max()),
                "final training loss": mean_interval(run[run.step == run.step.max()].loss).short,
                "time of an update": clock.step_ratio(DEEP, arm),
                "updates to SGD's loss": _at_least(updates.interval, updates.censored),
                "seconds to SGD's loss": _at_least(seconds.interval, seconds.censored),
            }
        )
    return pd.DataFrame(rows)


def _tuned(trials: pd.DataFrame, problem: str, arm: str) -> str:
    return in_words(tuning_of(trials[(trials.problem == problem) & (trials.arm == arm) & trials.chosen].iloc[0]))


def _at_least(interval: Interval, censored: int) -> str:
    return f"{'≥ ' if censored else ''}{interval.estimate:.3g}"


def _method(origin: Provenance) -> str:
    c = origin.config
    deep = c["autoencoder"]
    return (
        f"Preset {c['preset']}: {c['backbone']} with the heads {', '.join(label(p) for p in c['poolings'])} on "
        f"{origin.data['label']}, batch {c['batch_size']}, {c['epochs']} epochs with the schedule {c['schedule']}, "
        f"{len(origin.seeds)} seeds; the same initial weights and batches for every arm. Each arm is tuned with {c['trials']} "
        f"quasi-random trials of {c['trial_epochs']} epochs over its learning rate and one more setting, on a seed that is not "
        "among those reported; the lowest training loss decides. Steps of all arms are timed interleaved. Autoencoder: "
        f"encoder {'-'.join(map(str, deep['widths']))} on {deep['image_size']}×{deep['image_size']} grey pixels "
        f"({deep['dataset']}), {deep['activation']}, {deep['initialisation']} initialisation, batch {deep['batch_size']}; "
        f"SGD takes {deep['updates']} updates, K-FAC "
        f"{DEEP_ARMS['kfac'].share:g} times as many, both with a cosine schedule, {deep['trials']} trials each."
    )


def _remarks(trials: pd.DataFrame, targets: pd.DataFrame, claims: list[Claim]) -> list[str]:
    remarks = []
    if diverged := int(trials.diverged.sum()):
        remarks.append(f"{diverged} of {len(trials)} trials diverged; they count in the budget.")
    if at_the_edge := _at_the_edge(trials):
        remarks.append(
            f"The best learning rate is the largest or the smallest of those tried for {', '.join(at_the_edge)}."
        )
    if censored := int(targets[targets.target == "final"].censored.sum()):
        total = (targets.target == "final").sum()
        remarks.append(f"{censored} of {total} runs do not reach SGD's final loss: their steps are a lower bound.")
    if not claims:
        remarks.append("Without runs of K-FAC no claim can be judged.")
    return remarks


def _at_the_edge(trials: pd.DataFrame) -> list[str]:
    """Arms whose tuned learning rate has no worse neighbour on one side."""
    found = []
    for (problem, arm), some in trials.groupby(["problem", "arm"], sort=False):
        rates = some[some.first_parameter == "learning_rate"].first_value
        if len(rates) > 1 and float(some[some.chosen].first_value.iloc[0]) in (rates.min(), rates.max()):
            found.append(f"{name(str(arm))} ({label(str(problem))})")
    return found


def _pictures(
    folder: Path, origin: Provenance, curves: pd.DataFrame, parts: pd.DataFrame, clock: Clock
) -> list[Picture]:
    scope = f"{origin.data['label']}, {origin.config['backbone']}, n = {len(origin.seeds)} seeds."
    networks = curves[curves.problem != DEEP]
    pictures = [
        Picture(
            "optimisers",
            "Training loss (mean of the last half epoch) over steps and over seconds of the interleaved timing: geometric mean "
            f"over seeds. {scope}",
            figures.curves(networks, clock),
        ),
        Picture(
            "optimisers_breakdown",
            f"Where the time of a step goes, mean over the timed steps. {scope}",
            figures.breakdown(parts),
        ),
        Picture(
            "optimisers_autoencoder",
            "Autoencoder: training loss of an image over updates and over seconds; geometric mean over seeds, thin lines each. "
            f"{origin.data['labels'].partition('autoencoder: ')[2]}.",
            figures.curves(curves[curves.problem == DEEP], clock, seeds=True),
        ),
    ]
    if (folder / "optimisers_sensitivity.csv").exists():
        table = read_table(folder, "optimisers_sensitivity", (*KEYS, "damping", "learning_rate", "train_loss"))
        words = "; ".join(
            _sensitivity_words(some, str(problem)) for problem, some in table.groupby("problem", sort=False)
        )
        caption = f"Training loss of K-FAC after the epochs of a trial, by damping and learning rate. {words}. {scope}"
        pictures.insert(1, Picture("optimisers_sensitivity", caption, figures.sensitivity(table)))
    return pictures


def _sensitivity_words(table: pd.DataFrame, problem: str) -> str:
    best = table.sort_values("train_loss").iloc[0]
    return f"{label(problem)}: best {best.train_loss:.3g} at damping {best.damping:g}, learning rate {best.learning_rate:g}"


def _deep_caption(origin: Provenance) -> str:
    return (
        "The autoencoder: training loss is the cross-entropy summed over the pixels of an image, mean over all training images. "
        "Ratios are to SGD, ≥: not reached in some seeds, then one more than the updates of the run count. "
        f"{origin.data['labels'].partition('autoencoder: ')[2]}."
    )
