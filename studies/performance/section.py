"""What the performance study found, computed from ``performance.csv`` and the tables of curvature and K-FAC steps beside it."""

from pathlib import Path

import pandas as pd

from studies.performance import curvature_section, figures, kfac_section
from studies.report.section import Picture, Section, Table
from studies.results import Provenance, read_provenance, read_table

COLUMNS = ("images", "channels", "height", "width", "variant", "repeat", "milliseconds", "peak_mib")
BASELINE, BOUND = "textbook", "one matrix product"


def summary(repeats: pd.DataFrame) -> pd.DataFrame:
    """Median, quartiles, peak memory, speed-up over the textbook and multiple of the bound, by shape and variant."""
    shape = repeats[["images", "channels", "height", "width"]].astype(str).agg("×".join, axis=1)
    table = (
        repeats.assign(shape=shape)
        .groupby(["shape", "variant"], sort=False)
        .agg(
            median=("milliseconds", "median"),
            low=("milliseconds", lambda v: v.quantile(0.25)),
            high=("milliseconds", lambda v: v.quantile(0.75)),
            peak_mib=("peak_mib", "first"),
        )
        .reset_index()
    )
    medians = table.set_index(["shape", "variant"])["median"].unstack("variant")
    peaks = table.set_index(["shape", "variant"])["peak_mib"].unstack("variant")
    table["speed_up"] = medians[BASELINE].loc[table["shape"]].to_numpy() / table["median"]
    table["times_bound"] = table["median"] / medians[BOUND].loc[table["shape"]].to_numpy()
    table["memory_ratio"] = table.peak_mib / peaks[BASELINE].loc[table["shape"]].to_numpy()
    return table


def section(folder: Path) -> Section:
    """The section of the report for the results in `folder`."""
    repeats, origin = read_table(folder, "performance", COLUMNS), read_provenance(folder, "performance")
    curvature = read_table(folder, "performance_curvature", curvature_section.COLUMNS)
    steps = read_table(folder, "performance_kfac", kfac_section.COLUMNS)
    parts = kfac_section.breakdown(read_table(folder, "performance_kfac_parts", kfac_section.PART_COLUMNS), steps)
    table, costs, targets = summary(repeats), curvature_section.summary(curvature), kfac_section.summary(steps)
    return Section(
        title="Performance: what do the GCP head, the curvature and K-FAC's steps cost?",
        question="The head's forward and backward pass against five Newton-Schulz steps written as in a textbook with plain "
        "autograd, curvature quantities against a plain forward and backward pass, and K-FAC's steps against SGD's; in float32.",
        method=_method(origin),
        provenance=origin,
        pictures=[
            Picture("performance", _caption(table), figures.times(table)),
            curvature_section.picture(costs, curvature),
            kfac_section.picture(targets, parts),
        ],
        tables=[
            Table(
                "performance_summary",
                "Medians over repeats. Speed-up and memory relative to the textbook version; "
                "the bound is one batched product of C × n by n × C matrices, n = min(C, HW).",
                _printed(table),
            ),
            curvature_section.printed(costs),
            *kfac_section.printed(targets, steps),
            kfac_section.parts_table(parts),
        ],
    )


def _method(origin: Provenance) -> str:
    c = origin.config
    return (
        f"Random rectified features, no 1×1 reduction, {c['timing_threads']} thread(s) on {origin.device}. Each of the "
        f"{c['repeats']} repeats runs every variant once, in turn; peak memory is what torch's allocator holds at once."
    )


def _caption(table: pd.DataFrame) -> str:
    gcp = table[table.variant == "gcp"]
    found = ", ".join(f"{row.speed_up:.1f} times at {row.shape}" for row in gcp.itertuples())
    return f"Dots: medians, whiskers: quartiles over repeats. Speed of the gcp head relative to the textbook version: {found}."


def _printed(table: pd.DataFrame) -> pd.DataFrame:
    columns = {
        "shape": "features",
        "variant": "variant",
        "median": "median [ms]",
        "speed_up": "speed-up",
        "times_bound": "times the bound",
        "peak_mib": "peak [MiB]",
        "memory_ratio": "memory ratio",
    }
    named = table.assign(variant=[figures.NAMES.get(v, v) for v in table.variant])
    return named[list(columns)].rename(columns=columns)
