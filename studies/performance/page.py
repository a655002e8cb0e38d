"""What the performance study found: ratios within a repeat, their medians and quartiles, targets and floors."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from studies.draw import LABELS, Forest
from studies.draw.numbers import estimate_words
from studies.engine.study import Results
from studies.page import Fold, Picture, Table
from studies.performance.curvature_costs import BASELINE, COPY, COPY_BYTES, PRODUCT, PRODUCT_OPERATIONS
from studies.performance.curvature_costs import TARGETS as CURVATURE_TARGETS
from studies.performance.heads import BOUND, TEXTBOOK, VARIANTS
from studies.performance.kfac_costs import KINDS, METHODS, PERIODS, PLAIN, shares
from studies.performance.kfac_costs import TARGETS as KFAC_TARGETS
from studies.results import Provenance
from studies.statistics import Interval, median_interval

MILLISECONDS, PEAK = "milliseconds", "peak MiB"


def folds(results: Results) -> Sequence[Fold]:
    """Heads, curvature quantities, K-FAC's steps: each a picture and a table."""
    records, origin = results.records, results.provenance
    return [heads(records, origin), curvature(records, origin), kfac(records, origin)]


def _times(records: pd.DataFrame) -> pd.DataFrame:
    """Milliseconds by repeat and layer."""
    return records[records.quantity == MILLISECONDS].pivot(index="index", columns="layer", values="value")


def _single(records: pd.DataFrame, quantity: str, by: str = "layer") -> "pd.Series[float]":
    """A quantity that is measured once, by layer (or optimiser)."""
    return records[records.quantity == quantity].set_index(by).value


def _bar(label: str, group: str, interval: Interval) -> dict[str, Any]:
    """A row of a forest of ratios."""
    ends = (interval.estimate, interval.low, interval.high)
    nothing = {
        "outcome": "",
        "claimed": "",
        "log": True,
        "seed": -1,
        "zone_low": 1.0,
        "zone_high": 1.0,
        "reference": 1.0,
    }
    return nothing | {
        "row": label,
        "group": group,
        "estimate": interval.estimate,
        "low": interval.low if math.isfinite(interval.low) else math.nan,
        "high": interval.high if math.isfinite(interval.high) else math.nan,
        "numbers": estimate_words(*ends),
    }


def _forest(rows: list[dict[str, Any]], x_label: str) -> Any:
    return Forest(rows="row", groups="group", x_label=x_label, labels=0.34).draw(pd.DataFrame(rows))


def heads(records: pd.DataFrame, origin: Provenance) -> Fold:
    """Every variant of the head at every shape, relative to the textbook version."""
    shapes = [name for name in dict.fromkeys(records.network) if name.startswith("features ")]
    rows, bars = [], []
    for shape in shapes:
        part = records[records.network == shape]
        times, peaks = _times(part), _single(part, PEAK)
        for name in VARIANTS:
            ratio = median_interval(times[name] / times[TEXTBOOK])
            bars.append(_bar(name, shape, ratio))
            rows.append({
                "features": shape.removeprefix("features "),
                "variant": name,
                "median [ms]": times[name].median(),
                "speed-up": 1 / ratio.estimate,
                "times the bound": (times[name] / times[BOUND]).median(),
                "peak [MiB]": peaks[name],
                "memory / textbook": peaks[name] / peaks[TEXTBOOK],
            })  # fmt: skip
    table = pd.DataFrame(rows)
    gcp = table[table.variant == "gcp"]
    found = ", ".join(f"{row[3]:.1f} times at {row[0]}" for row in gcp.itertuples(index=False))
    caption = f"The gcp head is faster than the textbook version {found}. Medians over repeats with 95 % intervals."
    return Fold(
        title="Cost of the pooling head",
        pictures=[
            Picture("performance", caption, _forest([b for b in bars if b["row"] != TEXTBOOK], "time / textbook"))
        ],
        tables=[
            Table(
                "performance_heads", "Forward and backward pass, float32; the bound is one product of matrices.", table
            )
        ],
        method=[
            "Random rectified features, no 1×1 reduction. The textbook version is the covariance, five Newton-Schulz steps and "
            "the upper triangle in plain autograd. The bound is one batched product of C × n by n × C matrices, n = min(C, HW). "
            "Peak memory is what torch's allocator holds at once."
        ],
        provenance=origin,
        page="performance",
    )


def curvature(records: pd.DataFrame, origin: Provenance) -> Fold:
    """Curvature quantities relative to a forward and backward pass, their targets and their physical floor."""
    part = records[records["head"].eq("gcp") & records.network.str.startswith("3-c-c")]
    times, peaks = _times(part), _single(part, PEAK)
    operations, moved = _single(part, "operations"), _single(part, "bytes")
    rows, bars = [], []
    for name in peaks.index:
        ratio = median_interval(times[name] / times[BASELINE])
        floor = max(
            operations[name] / PRODUCT_OPERATIONS * times[PRODUCT].median(),
            moved[name] / COPY_BYTES * times[COPY].median(),
        )
        bars.append(_bar(name, part.network.iloc[0], ratio))
        rows.append({
            "quantity": name,
            "median [ms]": times[name].median(),
            "times forward + backward": ratio.estimate,
            "target: below": CURVATURE_TARGETS.get(name, math.nan),
            "peak [MiB]": peaks[name],
            "times the floor": times[name].median() / floor,
        })  # fmt: skip
    table = pd.DataFrame(rows)
    above = table[table["times forward + backward"] > table["target: below"]].quantity
    verdict = f"Above its target: {', '.join(above)}." if len(above) else "Every quantity with a target is within it."
    return Fold(
        title="Cost of curvature quantities",
        pictures=[
            Picture(
                "performance_curvature",
                f"{verdict} Medians with 95 % intervals.",
                _forest(bars, "time / forward + backward"),
            )
        ],
        tables=[
            Table("performance_curvature_costs", "A CIFAR network with a GCP head; the floor as defined below.", table)
        ],
        method=[
            "Ratios are those to a plain forward and backward pass in the same repeat. The floor is the larger of the operations "
            "that a quantity cannot do without, at the rate of a large matrix product, and of the activations it reads or "
            "writes, at the rate of a large copy; both rates are measured in the same repeats."
        ],
        provenance=origin,
        page="performance",
    )


def kfac_costs(records: pd.DataFrame) -> dict[str, Interval]:
    """Each quantity of TARGETS relative to SGD's, of one network, head and method; `records` have those of SGD's memory, too.

    Times are medians over repeats of what a period's kinds of steps cost in the SGD steps next to them. Memory counts the
    optimiser's state and is no sample.
    """
    method = records[records.optimizer != "sgd"]
    own, sgd = (
        method[method.quantity == quantity].pivot(index="index", columns="layer", values="value")
        for quantity in (MILLISECONDS, "milliseconds of SGD")
    )
    ratios = own / sgd
    costs = {
        f"({factors}, {inverses})": median_interval(
            np.sum([share * ratios[kind] for kind, share in shares(factors, inverses).items()], axis=0)
        )
        for factors, inverses in PERIODS
    }
    memory = records[records.quantity.isin((PEAK, "state MiB"))].groupby(records.optimizer == "sgd").value.sum()
    size = float(memory[False] / memory[True])
    return costs | {"plain step": median_interval(ratios[PLAIN]), "peak memory": Interval(size, size, size, 1)}


def kfac(records: pd.DataFrame, origin: Provenance) -> Fold:
    """K-FAC's steps relative to SGD's: periods of the intervals, plain steps, memory, and the parts of the largest step."""
    steps = records[records.optimizer != ""]
    rows, bars = [], []
    for (network, head), part in steps.groupby(["network", "head"], sort=False):
        for name in METHODS:
            for quantity, interval in kfac_costs(part[part.optimizer.isin((name, "sgd"))]).items():
                target = KFAC_TARGETS[quantity]
                bars.append(_bar(f"{name}, {quantity}", f"{LABELS.get(str(head), head)}, {network}", interval))
                rows.append({
                    "head": head,
                    "method": name,
                    "quantity": quantity,
                    "times SGD's": interval.estimate,
                    "95 % interval": "" if interval.n == 1 else interval.short,
                    "target: below": target,
                    "reached": _reached(interval, target),
                })  # fmt: skip
    table = pd.DataFrame(rows)
    missed = [f"{r[1]} {r[2]} with {r[0]}" for r in table[table.reached == "no"].itertuples(index=False)]
    counts = table.reached.value_counts()
    words = f"Targets: {', '.join(f'{counts[w]} {w}' for w in ('yes', 'no', 'undecided') if w in counts)}"
    caption = (
        f"{words}{f'; missed: {chr(44).join(missed)}' if missed else ''}. Medians over repeats with 95 % intervals."
    )
    parts = steps[steps.quantity == "milliseconds of a part"]
    breakdown = parts.pivot_table(
        index=["head", "optimizer"], columns="layer", values="value", aggfunc="median", sort=False
    )
    return Fold(
        title="Cost of K-FAC's steps",
        pictures=[Picture("performance_kfac", caption, _forest(bars, "times SGD's"))],
        tables=[
            Table(
                "performance_kfac_targets",
                "Mean step over a period (factor interval, inverse interval), in steps of SGD.",
                table,
            ),
            Table(
                "performance_kfac_parts",
                "Milliseconds of each part of a step with factors and inverses.",
                breakdown.reset_index(),
            ),
        ],
        method=[
            f"Three kinds of steps ({', '.join(KINDS)}) are timed, each next to SGD steps; a period of the intervals "
            "combines them by how often each is taken. Peak memory counts the optimiser's state."
        ],
        provenance=origin,
        page="performance",
    )


def _reached(interval: Interval, target: float) -> str:
    """Whether the whole interval is below the target."""
    return "yes" if interval.high < target else "no" if interval.low > target else "undecided"
