"""What the curvature quantities cost, computed from ``performance_curvature.csv``."""

import pandas as pd

from studies.performance import curvature_figures as figures
from studies.performance.curvature_costs import BASELINE, COPY_BYTES, PRODUCT_OPERATIONS, TARGETS
from studies.report.section import Picture, Table

COLUMNS = (
    "images",
    "channels",
    "quantity",
    "repeat",
    "milliseconds",
    "peak_mib",
    "operations",
    "bytes",
    "product_ms",
    "copy_ms",
)


def summary(repeats: pd.DataFrame) -> pd.DataFrame:
    """Medians by quantity, the ratio to a forward and backward pass of the same repeat, and the multiple of the floor.

    The floor is the larger of operations at the median rate of the large product and bytes at that of the large copy.
    """
    baseline = repeats[repeats.quantity == BASELINE].set_index("repeat").milliseconds
    operations_per_ms = PRODUCT_OPERATIONS / repeats.product_ms.median()
    bytes_per_ms = COPY_BYTES / repeats.copy_ms.median()
    table = (
        repeats.assign(ratio=repeats.milliseconds / repeats.repeat.map(baseline))
        .groupby("quantity", sort=False)
        .agg(
            median=("milliseconds", "median"),
            ratio=("ratio", "median"),
            low=("ratio", lambda v: v.quantile(0.25)),
            high=("ratio", lambda v: v.quantile(0.75)),
            peak_mib=("peak_mib", "first"),
            operations=("operations", "first"),
            bytes=("bytes", "first"),
        )
        .reset_index()
    )
    arithmetic, traffic = table.operations / operations_per_ms, table.bytes / bytes_per_ms
    return table.assign(
        arithmetic_ms=arithmetic,
        traffic_ms=traffic,
        times_floor=table["median"] / pd.concat([arithmetic, traffic], axis=1).max(axis=1),
        target=table.quantity.map(TARGETS),
    )


def picture(table: pd.DataFrame, repeats: pd.DataFrame) -> Picture:
    """The figure with its caption."""
    above = table[table.ratio > table.target.astype(float)].quantity  # no target is NaN: never above
    verdict = f"Above its target: {', '.join(above)}" if len(above) else "Every quantity with a target is within it"
    return Picture(
        "performance_curvature",
        f"Time and memory of curvature quantities of the CIFAR network 3-c-c-P-2c-2c-P with a GCP head, c = "
        f"{repeats.channels[0]}, batch {repeats.images[0]}, relative to a plain forward and backward pass of the same repeat: "
        f"medians, whiskers the quartiles; ticks: targets; crosses: the floor. {verdict}.",
        figures.costs(table),
    )


def printed(table: pd.DataFrame) -> Table:
    """The table of the report."""
    named = pd.DataFrame(
        {
            "quantity": table.quantity,
            "median [ms]": table["median"],
            "times forward + backward": table.ratio,
            "target": ["" if t != t else f"{t:g}" for t in table.target],
            "peak [MiB]": table.peak_mib,
            "operations [GFLOP]": table.operations / 1e9,
            "at the rate of a large product [ms]": table.arithmetic_ms,
            "bytes [MiB]": table.bytes / 2**20,
            "at the rate of a large copy [ms]": table.traffic_ms,
            "times the floor": table.times_floor,
        }
    )
    caption = (
        "Medians over repeats. The floor is the larger of the two times: operations of the convolutions and linear layers "
        "that the quantity cannot do without, and activations read or written once a pass; the head is left out of it."
    )
    return Table("performance_curvature_summary", caption, named)
