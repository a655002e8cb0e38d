"""What the factorial found: does a second-order optimiser help GCP less than it helps GAP?"""

import math
from pathlib import Path

import pandas as pd

from studies.optimisers.measures import REFERENCE
from studies.optimisers.runs import in_words, tuning_of
from studies.preconditioning.factorial import figures
from studies.preconditioning.factorial.claims import GROUP, all_claims, control, name
from studies.preconditioning.factorial.measures import COMMON, OWN, Factorial, interval, ratio
from studies.preconditioning.factorial.training import COSTS, CURVES, NAME, TRIALS
from studies.preconditioning.part import Part
from studies.report.section import Claim, Picture, Table
from studies.report.style import label
from studies.results import read_table
from studies.statistics import Interval, mean_interval

KEYS = ("pooling", "optimiser")


def part(folder: Path) -> Part | None:
    """Verdicts, figures and the table of cells; None where the study was run without the factorial."""
    if not (folder / f"{NAME}.csv").exists():
        return None
    epochs = read_table(folder, NAME, (*KEYS, "seed", "epoch", "step", "train_loss", "test_top1"))
    curves = read_table(folder, CURVES, (*KEYS, "seed", "step", "loss"))
    trials = read_table(folder, TRIALS, (*KEYS, "first_parameter", "first_value", "train_loss", "chosen", "diverged"))
    costs = read_table(folder, COSTS, (*KEYS, "step", "milliseconds"))
    factorial = Factorial(epochs, curves, costs)
    claims = all_claims(factorial)
    return Part(claims, remarks(factorial, trials, claims), pictures(factorial, curves), [table(factorial, trials)])


# -------------------------------------------------------------------------------------------------------------- remarks


def remarks(factorial: Factorial, trials: pd.DataFrame, claims: list[Claim]) -> list[str]:
    """What the control says, and what limits the verdicts."""
    found = [control(factorial, claims)]
    cells = [(p, o) for p in factorial.poolings for o in factorial.optimisers]
    total = len(cells) * len(factorial.seeds)
    for kind, words in ((COMMON, "the common target"), (OWN, "SGD's final loss under their head")):
        if censored := sum(factorial.censored(kind, *cell) for cell in cells):
            found.append(f"{censored} of {total} runs never reach {words}; their steps count as a lower bound.")
    if early := sum(factorial.at_once(COMMON, *cell) for cell in cells):
        found.append(
            f"{early} of {total} runs are below the common target at the first point of their smoothed curve; they count with "
            "between one step and the steps there."
        )
    if diverged := int(trials.diverged.sum()):
        found.append(f"{diverged} of {len(trials)} trials diverged; they count in the budget.")
    if edges := at_the_edge(trials):
        found.append(f"The chosen learning rate is the largest or smallest of those tried for {', '.join(edges)}.")
    return [f"{GROUP.partition(':')[0]}: {words}" for words in found]


def at_the_edge(trials: pd.DataFrame) -> list[str]:
    """Cells whose tuned learning rate has no neighbour on one side."""
    found = []
    for (pooling, optimiser), some in trials.groupby(list(KEYS), sort=False):
        rates = some[some.first_parameter == "learning_rate"].first_value
        if len(rates) > 2 and float(some[some.chosen].first_value.iloc[0]) in (rates.min(), rates.max()):
            found.append(f"{name(str(optimiser))} ({label(str(pooling))})")
    return found


# ---------------------------------------------------------------------------------------------------- figures and table


def pictures(factorial: Factorial, curves: pd.DataFrame) -> list[Picture]:
    """Loss over steps, and the interaction plot."""
    n = f"n = {len(factorial.seeds)} seeds"
    slowest = [label(p) for p in factorial.poolings if p == _slowest(factorial)]
    return [
        Picture(
            "preconditioning_factorial_curves",
            "E: training loss (mean of the last half epoch) over steps for each head and tuned optimiser; thin: seeds, thick: "
            f"geometric means, {n}. Dashed: the common target, on each seed the largest of SGD's final losses (mostly that of "
            f"{slowest[0]}); dotted: SGD's final loss under the same head. {_final_words(factorial)}",
            figures.curves(curves, factorial),
        ),
        Picture(
            "preconditioning_factorial",
            "E: steps to the common target (left) and to SGD's final loss under the same head (right): geometric mean with 95 % "
            f"interval, dots: seeds, {n}; open triangles: not reached, a lower bound. Parallel lines on the logarithmic axis: no "
            f"interaction. {_interaction_words(factorial)}",
            figures.interactions(factorial),
        ),
    ]


def _slowest(factorial: Factorial) -> str:
    """The pooling whose SGD is the common target on most seeds."""
    ends = [{p: factorial.target(OWN, p, s) or 0.0 for p in factorial.poolings} for s in factorial.seeds]
    winners = [max(own, key=own.__getitem__) for own in ends]
    return max(factorial.poolings, key=winners.count)


def _final_words(factorial: Factorial) -> str:
    """The cell with the lowest final loss."""
    means = {
        (p, o): interval([factorial.loss(p, o, s) for s in factorial.seeds]).estimate
        for p in factorial.poolings
        for o in factorial.optimisers
    }
    finite = {cell: mean for cell, mean in means.items() if math.isfinite(mean)}
    if not finite:
        return "No cell trained without divergence."
    pooling, optimiser = min(finite, key=finite.__getitem__)
    lowest = f"{label(pooling)} with {name(optimiser)}, {finite[pooling, optimiser]:.3g} on average"
    return f"The lowest final loss is that of {lowest}."


def _interaction_words(factorial: Factorial) -> str:
    """Speed-ups to the common target in words."""
    words = []
    for optimiser in (o for o in factorial.optimisers if o != REFERENCE):
        ups = {p: ratio(list(factorial.speed_ups(COMMON, p, optimiser).values())) for p in factorial.poolings}
        words.append(
            f"{name(optimiser)} takes "
            + ", ".join(
                f"{_at_least(found, factorial.censored(COMMON, p, optimiser))} ({label(p)})" for p, found in ups.items()
            )
        )
    return "; ".join(words) + " times SGD's steps to the common target." if words else ""


def table(factorial: Factorial, trials: pd.DataFrame) -> Table:
    """One row for each cell."""
    rows = [row(factorial, trials, p, o) for p in factorial.poolings for o in factorial.optimisers]
    caption = (
        "E: every cell: tuned settings, results after the last epoch (mean over seeds with 95 % interval), epochs to the targets "
        "(geometric mean) and seconds to the common target in those of SGD under the same head, from the interleaved timing. "
        "≥: in some seeds not reached, then one step more than the whole run counts."
    )
    return Table("preconditioning_factorial_cells", caption, pd.DataFrame(rows))


def row(factorial: Factorial, trials: pd.DataFrame, pooling: str, optimiser: str) -> dict[str, object]:
    """One cell of the table."""
    losses = interval([factorial.loss(pooling, optimiser, s) for s in factorial.seeds])
    chosen = trials[(trials.pooling == pooling) & (trials.optimiser == optimiser) & trials.chosen]
    accuracy = mean_interval([100 * float(factorial.accuracies[pooling, optimiser, s]) for s in factorial.seeds])
    found: dict[str, object] = {
        "head": label(pooling),
        "optimiser": name(optimiser),
        "tuned": in_words(tuning_of(chosen.iloc[0])),
        "final training loss": losses.short if math.isfinite(losses.estimate) else "diverged",
        "test top-1 [%]": accuracy.short,
    }
    for kind, words in ((COMMON, "epochs to the common target"), (OWN, "epochs to SGD's final loss")):
        steps = [factorial.steps(kind, pooling, optimiser, s) for s in factorial.seeds]
        logs = interval([s.log() for s in steps if s is not None])
        epochs = math.exp(logs.estimate) / factorial.steps_per_epoch
        found[words] = (
            f"{'≥ ' if factorial.censored(kind, pooling, optimiser) else ''}{epochs:.2f}" if logs.n else "no target"
        )
    seconds = ratio(list(factorial.speed_ups(COMMON, pooling, optimiser, "seconds").values()))
    found["seconds to the common target, of SGD's"] = _at_least(seconds, factorial.censored(COMMON, pooling, optimiser))
    found["time of a step, of SGD's"] = f"{factorial.clock.step_ratio(pooling, optimiser):.2f}"
    return found


def _at_least(found: Interval, censored: int) -> str:
    return f"{'≥ ' if censored else ''}{found.estimate:.2f}" if found.n else "no target"
