"""What K-FAC's steps cost, computed from ``performance_kfac.csv`` and ``performance_kfac_parts.csv``."""

import numpy as np
import pandas as pd

from studies.performance import kfac_figures as figures
from studies.performance.kfac_costs import KINDS, PERIODS, PLAIN, TARGETS, shares
from studies.report.section import Picture, Table
from studies.statistics import NOT_SUPPORTED, SUPPORTED, UNDECIDED, Interval, median_interval, verdict

CASE = ["backbone", "pooling", "images"]
COLUMNS = (
    *CASE,
    "method",
    "repeat",
    "kind",
    "milliseconds",
    "sgd_ms",
    "peak_mib",
    "state_mib",
    "sgd_peak_mib",
    "sgd_state_mib",
)
PART_COLUMNS = (*CASE, "method", "repeat", "part", "milliseconds")
WORDS = {SUPPORTED: "yes", NOT_SUPPORTED: "no", UNDECIDED: "undecided"}


def summary(repeats: pd.DataFrame) -> pd.DataFrame:
    """Each quantity of TARGETS relative to SGD's by head and method: estimate, low, high, target, whether it is reached.

    Times are medians over repeats of what a period's kinds of steps cost in the SGD steps next to them, with a 95 % interval.
    Memory counts the optimiser's state, too, and is no sample.
    """
    rows = []
    for labels, one in repeats.groupby([*CASE, "method"], sort=False):
        for quantity, interval in _quantities(one).items():
            rows.append(
                dict(zip([*CASE, "method"], labels, strict=True))
                | {"quantity": quantity, "estimate": interval.estimate, "low": interval.low, "high": interval.high}
                | {"target": TARGETS[quantity], "reached": WORDS[verdict(interval, "below", TARGETS[quantity])]}
            )
    return pd.DataFrame(rows)


def _quantities(one: pd.DataFrame) -> dict[str, Interval]:
    """Of one head and method."""
    ratios = one.assign(ratio=one.milliseconds / one.sgd_ms).pivot(index="repeat", columns="kind", values="ratio")
    found = {
        f"({factors}, {inverses})": median_interval(
            sum(share * ratios[kind] for kind, share in shares(factors, inverses).items())
        )
        for factors, inverses in PERIODS
    }
    first = one.iloc[0]
    memory = (first.peak_mib + first.state_mib) / (first.sgd_peak_mib + first.sgd_state_mib)
    return found | {
        "plain step": median_interval(ratios[PLAIN]),
        "peak memory": Interval(memory, memory, memory, 1),
    }


def breakdown(parts: pd.DataFrame, repeats: pd.DataFrame) -> pd.DataFrame:
    """Median milliseconds of each part of a step with factors and inverses, and in median SGD steps of the same head."""
    table = parts.groupby([*CASE, "method", "part"], sort=False).milliseconds.median().reset_index()
    of_sgd = repeats.groupby(CASE).sgd_ms.median().rename("sgd_ms")
    table = table.merge(of_sgd.reset_index(), on=CASE)
    return table.assign(sgd_steps=table.milliseconds / table.sgd_ms)


def picture(table: pd.DataFrame, parts: pd.DataFrame) -> Picture:
    """The figure with its caption."""
    counts = {word: int((table.reached == word).sum()) for word in WORDS.values()}
    missed = [f"{r.method} {r.quantity} with {r.pooling}" for r in table[table.reached == "no"].itertuples()]
    missing = f"; missed: {', '.join(missed)}" if missed else ""
    first = table.iloc[0]
    return Picture(
        "performance_kfac",
        f"K-FAC's steps on {first.backbone}, batch {first.images}, relative to SGD with momentum. Left: mean step over a period "
        f"of the intervals (of the factors, of the inverses), a plain step, and peak memory; dots medians, whiskers 95 % "
        f"intervals, ticks the targets. Right: where the time of a step with factors and inverses goes. Targets: "
        f"{counts['yes']} reached, {counts['no']} not, {counts['undecided']} undecided{missing}.",
        figures.costs(table, parts),
    )


def printed(table: pd.DataFrame, repeats: pd.DataFrame) -> list[Table]:
    """The tables of the report: the targets, and what the single kinds of steps take."""
    targets = pd.DataFrame(
        {
            "head": table.pooling,
            "method": table.method,
            "quantity": table.quantity,
            "times SGD's": table.estimate,
            "95 % interval": [_ends(low, high) for low, high in table[["low", "high"]].to_numpy()],
            "target: below": table.target,
            "reached": table.reached,
        }
    )
    memory = repeats.groupby(["pooling", "method"], sort=False).agg(
        peak=("peak_mib", "first"), state=("state_mib", "first"), sgd_peak=("sgd_peak_mib", "first")
    )
    ratios = repeats.assign(ratio=repeats.milliseconds / repeats.sgd_ms)
    medians = ratios.groupby(["pooling", "method", "kind"], sort=False).ratio.median().unstack("kind")[list(KINDS)]
    kinds = medians.join(memory).reset_index()
    names = {
        "pooling": "head",
        "peak": "peak beyond state [MiB]",
        "state": "state [MiB]",
        "sgd_peak": "SGD's peak [MiB]",
    }
    return [
        Table(
            "performance_kfac_summary",
            "Mean cost of a step over a whole period (factor interval, inverse interval) in steps of SGD with momentum, "
            "combined from separately timed kinds of steps; peak memory with the optimiser's state.",
            targets,
        ),
        Table(
            "performance_kfac_steps",
            "Median time of the kinds of steps, in SGD steps next to them, and memory of the largest.",
            kinds.rename(columns=names),
        ),
    ]


def _ends(low: float, high: float) -> str:
    """Empty where nothing was sampled."""
    if low == high:
        return ""
    return f"{low:.3g} to {high:.3g}" if np.isfinite([low, high]).all() else "too few repeats"


def parts_table(table: pd.DataFrame) -> Table:
    """Where the time of a step with factors and inverses goes."""
    wide = table.pivot(index=["pooling", "method"], columns="part", values="milliseconds")
    wide = wide[list(dict.fromkeys(table.part))].reset_index().rename(columns={"pooling": "head"})
    caption = "Median milliseconds of each part of a step that updates all factors and inverts all layers."
    return Table("performance_kfac_breakdown", caption, wide)
