"""What the performance study found: ratios within a repeat, their medians with intervals, targets and floors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from studies.draw import LABELS, Forest
from studies.draw.numbers import estimate_words
from studies.engine.study import Results
from studies.page import Fold, Picture, Provenance, Table
from studies.performance.curvature_costs import BASELINE, COPY, COPY_BYTES, PRODUCT, PRODUCT_OPERATIONS, QUANTITIES
from studies.performance.heads import BOUND, TEXTBOOK, VARIANTS
from studies.performance.kfac_costs import KINDS, METHODS, OF_PART, OF_SGD, PERIODS, PLAIN, STATE, shares, target
from studies.statistics import Interval, median_interval
from studies.timing import MILLISECONDS, PEAK

Bars = list[tuple[str, str, Interval]]
"""Row, group and ratio of each bar of a forest."""


def folds(results: Results) -> Sequence[Fold]:
    """Heads, curvature quantities, K-FAC's steps: each a picture and a table."""
    return [fold(results.records, results.provenance) for fold in (heads, curvature, kfac)]


def _forest(bars: Bars, x_label: str, name: str, caption: str) -> Picture:
    rows = [
        (row, group, r.estimate, r.low, r.high, estimate_words(r.estimate, r.low, r.high)) for row, group, r in bars
    ]
    table = pd.DataFrame(rows, columns=["row", "group", "estimate", "low", "high", "numbers"])
    ends = dict.fromkeys(("zone_low", "zone_high", "reference"), 1.0)
    table = table.replace([np.inf, -np.inf], np.nan).assign(outcome="", claimed="", log=True, seed=-1, **ends)
    return Picture(name, caption, Forest(rows="row", groups="group", x_label=x_label, labels=0.34).draw(table))


def _times(records: pd.DataFrame, quantity: str = MILLISECONDS) -> pd.DataFrame:
    """By repeat and layer."""
    return records[records.quantity == quantity].pivot(index="index", columns="layer", values="value")


def _once(records: pd.DataFrame) -> pd.DataFrame:
    """What is measured once, by layer and quantity."""
    return records[records.quantity != MILLISECONDS].pivot(index="layer", columns="quantity", values="value")


def heads(records: pd.DataFrame, origin: Provenance) -> Fold:
    """Every variant of the head at every shape, relative to the textbook version."""
    rows: list[dict[str, Any]] = []
    bars: Bars = []
    for shape, part in records[records.network.str.startswith("features ")].groupby("network", sort=False):
        times, peaks = _times(part), _once(part)[PEAK]
        for name in VARIANTS:
            ratio = median_interval(times[name] / times[TEXTBOOK])
            bars += [(name, str(shape), ratio)] * (name != TEXTBOOK)
            rows.append({
                "features": str(shape).removeprefix("features "),
                "variant": name,
                "median [ms]": times[name].median(),
                "speed-up": 1 / ratio.estimate,
                "times the bound": (times[name] / times[BOUND]).median(),
                "peak [MiB]": peaks[name],
                "memory / textbook": peaks[name] / peaks[TEXTBOOK],
            })  # fmt: skip
    found = ", ".join(f"{row['speed-up']:.1f} times at {row['features']}" for row in rows if row["variant"] == "gcp")
    words = f"The gcp head is faster than the textbook version {found}. Medians over repeats with 95 % intervals."
    caption = "Forward and backward pass, float32; the bound is one product of matrices."
    return Fold(
        title="Cost of the pooling head",
        pictures=[_forest(bars, "time / textbook", "performance", words)],
        tables=[Table("performance_heads", caption, pd.DataFrame(rows))],
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
    times, once = _times(part), _once(part)
    ratios = {name: median_interval(times[name] / times[BASELINE]) for name in QUANTITIES}
    medians = times.median()
    floors = np.maximum(
        once.operations / PRODUCT_OPERATIONS * medians[PRODUCT], once["bytes"] / COPY_BYTES * medians[COPY]
    )
    table = pd.DataFrame({
        "median [ms]": medians,
        "times forward + backward": {name: ratio.estimate for name, ratio in ratios.items()},
        "target: below": {name: numbers[-1] for name, numbers in QUANTITIES.items()},
        "peak [MiB]": once[PEAK],
        "times the floor": medians / floors,
    }).loc[[*QUANTITIES]].rename_axis("quantity").reset_index()  # fmt: skip
    above = table[table["times forward + backward"] > table["target: below"]].quantity
    verdict = f"Above its target: {', '.join(above)}." if len(above) else "Every quantity with a target is within it."
    words = f"{verdict} Medians with 95 % intervals."
    bars = [(name, part.network.iloc[0], ratio) for name, ratio in ratios.items()]
    caption = "A CIFAR network with a GCP head; the floor as defined below."
    return Fold(
        title="Cost of curvature quantities",
        pictures=[_forest(bars, "time / forward + backward", "performance_curvature", words)],
        tables=[Table("performance_curvature_costs", caption, table)],
        method=[
            "Ratios are those to a plain forward and backward pass in the same repeat. The floor is the larger of the operations "
            "that a quantity cannot do without, at the rate of a large matrix product, and of the activations it reads or "
            "writes, at that of a large copy; both rates are measured in the same repeats. But for the kept graph each is of "
            "a new block, whose network and loss are tried on a few images first: of a small batch that is the larger part."
        ],
        provenance=origin,
        page="performance",
    )


def kfac_costs(records: pd.DataFrame) -> dict[str, Interval]:
    """Each quantity that may have a target, relative to SGD's, of one network, head and method; `records` have SGD's memory, too.

    Times are medians over repeats of what a period's kinds of steps cost in the SGD steps next to them. Memory counts the
    optimiser's state and is no sample.
    """
    ratios = _times(records) / _times(records, OF_SGD)
    costs = {
        f"({factors}, {inverses})": median_interval(
            np.sum([share * ratios[kind] for kind, share in shares(factors, inverses).items()], axis=0)
        )
        for factors, inverses in PERIODS
    }
    memory = records[records.quantity.isin((PEAK, STATE))].groupby(records.optimizer == "sgd").value.sum()
    size = float(memory[False] / memory[True])
    return costs | {"plain step": median_interval(ratios[PLAIN]), "peak memory": Interval(size, size, size, 1)}


def _reached(interval: Interval, target: float) -> str:
    """Whether the interval is below a target; "" where there is none."""
    if np.isnan(target):
        return ""
    return "yes" if interval.high < target else "no" if interval.low > target else "undecided"


def kfac(records: pd.DataFrame, origin: Provenance) -> Fold:
    """K-FAC's steps relative to SGD's: periods of the intervals, plain steps, memory, and the parts of the largest step."""
    steps = records[records.optimizer != ""]
    rows: list[dict[str, Any]] = []
    bars: Bars = []
    for (network, head), part in steps.groupby(["network", "head"], sort=False):
        for name in METHODS:
            for quantity, interval in kfac_costs(part[part.optimizer.isin((name, "sgd"))]).items():
                aim = target(str(network).partition(",")[0], name, quantity)
                bars.append((f"{name}, {quantity}", f"{LABELS.get(str(head), head)}, {network}", interval))
                rows.append({
                    "head": head,
                    "method": name,
                    "quantity": quantity,
                    "times SGD's": interval.estimate,
                    "95 % interval": "" if interval.n == 1 else interval.short,
                    "target: below": aim,
                    "reached": _reached(interval, aim),
                })  # fmt: skip
    table = pd.DataFrame(rows)
    missed = ", ".join(f"{r['method']} {r['quantity']} with {r['head']}" for r in rows if r["reached"] == "no")
    counts = table.reached.value_counts()
    targets = ", ".join(f"{counts[word]} {word}" for word in ("yes", "no", "undecided") if word in counts)
    parts = steps[steps.quantity == OF_PART].pivot_table(
        index=["head", "optimizer"], columns="layer", values="value", aggfunc="median", sort=False
    )
    reached = (
        f"Targets: {targets}{'; missed: ' * bool(missed)}{missed}."
        if targets
        else "No targets were set for this network."
    )
    words = f"{reached} Medians over repeats with 95 % intervals."
    of_steps = "Mean step over a period (factor interval, inverse interval), in steps of SGD."
    of_parts = "Milliseconds of each part of a step with factors and inverses."
    return Fold(
        title="Cost of K-FAC's steps",
        pictures=[_forest(bars, "times SGD's", "performance_kfac", words)],
        tables=[
            Table("performance_kfac_targets", of_steps, table),
            Table("performance_kfac_parts", of_parts, parts.reset_index()),
        ],
        method=[
            f"Three kinds of steps ({', '.join(KINDS)}) are timed, each next to SGD steps; a period of the intervals "
            "combines them by how often each is taken. Peak memory counts the optimiser's state."
        ],
        provenance=origin,
        page="performance",
    )
