"""Accuracies, matching epochs, and the claims that are judged on them.

The matching epoch of a network is the first after which its test top-1 is at least that of the GAP network of the same seed after
the last epoch of LRnorm. Where there is none it is censored: it counts with one epoch more than the training had, a lower bound.
"""

from functools import partial

import numpy as np
import pandas as pd

from studies.judge import Bound, Claim, Comparison, Difference, primary
from studies.judge.cells import Cell
from studies.judge.claims import Values

MATCHED = "stride of GCP"
"""The layer in records of GAP networks that have it in their last stage."""
KEYS = ["network", "head", "layer", "optimizer", "schedule", "seed"]
QUANTITIES = ["test_top1", "test_top5", "seconds"]


def kinds(records: pd.DataFrame) -> pd.DataFrame:
    """Records with the schedules of all families as norm, fast and adju, and K-FAC with whatever step as kfac."""
    optimizer = records.optimizer.where(records.optimizer == "sgd", "kfac")
    return records.assign(schedule=records.schedule.str.split("_").str[-1], optimizer=optimizer)


def by_epoch(records: pd.DataFrame) -> pd.DataFrame:
    """A row for each epoch: KEYS, epoch, test_top1, test_top5, seconds (of all steps so far)."""
    part = kinds(records[records.quantity.isin(QUANTITIES)])
    table = part.pivot(index=[*KEYS, "index"], columns="quantity", values="value")[QUANTITIES]
    return table.rename_axis(columns=None).rename_axis(index={"index": "epoch"}).reset_index()


def final(records: pd.DataFrame) -> pd.DataFrame:
    """The test top-1 after the last epoch of each network: KEYS, value; nan where training diverged."""
    lost = records[records.quantity == "diverged"].assign(layer="", value=np.nan)  # the layer says why
    epochs = records[records.quantity == "test_top1"].sort_values("index")
    return kinds(pd.concat([epochs, lost]).drop_duplicates(KEYS, keep="last"))[[*KEYS, "value"]]


def matching(records: pd.DataFrame) -> pd.DataFrame:
    """The matching epoch of each network: KEYS, value, censored, seconds (of its steps; nan where censored).

    Networks of a seed without a GAP network under LRnorm have none.
    """
    gap = with_sgd(records).query("head == 'gap' and schedule == 'norm'")
    epochs = by_epoch(records).merge(gap[["network", "seed", "value"]], on=["network", "seed"])
    reached = epochs[epochs.test_top1 >= epochs.value].groupby(KEYS)[["epoch", "seconds"]].min()
    table = epochs.groupby(KEYS).epoch.max().rename("last").to_frame().join(reached).reset_index()
    return table.assign(value=table.epoch.fillna(table["last"] + 1), censored=table.epoch.isna())


def of_norm(records: pd.DataFrame) -> pd.DataFrame:
    """The matching epochs of networks trained with SGD as shares of the epochs of LRnorm."""
    table = matching(records)
    whole = table[table.schedule == "norm"].groupby("network")["last"].max()
    return table[(table.optimizer == "sgd") & (table.layer == "")].assign(value=table.value / table.network.map(whole))


def with_sgd(records: pd.DataFrame) -> pd.DataFrame:
    """`final` of the networks that SGD trained, at their published strides."""
    table = final(records)
    return table[(table.optimizer == "sgd") & (table.layer == "")]


def of_both(records: pd.DataFrame, cells: tuple[Cell, Cell]) -> pd.DataFrame:
    """`final` in two cells, of the seeds that were trained in both: controls and K-FAC have fewer."""
    table = final(records)
    rows = [table[np.logical_and.reduce([table[column] == word for column, word in cell.items()])] for cell in cells]
    places = [row[["network", "seed"]] for row in rows]
    return pd.concat(rows).merge(places[0].merge(places[1]))


WORDS = {"norm": "LRnorm", "fast": "LRfast", "adju": "LRadju"}


def _cell(head: str, schedule: str, layer: str = "", optimizer: str = "sgd") -> dict[str, str]:
    return {"head": head, "layer": layer, "schedule": schedule, "optimizer": optimizer}


def _claim(name: str, quantity: str, compare: Comparison, values: Values) -> Claim:
    return Claim(name, "Is it more accurate, or sooner?", "convergence", quantity, compare, values)


def _difference(of: dict[str, str], to: dict[str, str], scale: str = "logit") -> Claim:
    """Accuracy in one cell less that in another."""
    words = [", ".join({**c, "schedule": WORDS[c["schedule"]]}.values()) for c in (of, to)]
    name = " - ".join(words).replace(", sgd", "").replace(", ,", ",")
    compare = Difference(of, to, margin=0.005, scale=scale)
    return _claim(f"final top-1: {name}", f"test top-1, {name}", compare, partial(of_both, cells=(of, to)))


def _epoch(head: str, schedule: str) -> Claim:
    where = f"{head}, {WORDS[schedule]}"
    compare = Bound({"head": head, "schedule": schedule}, "below", reference=1.0, scale="log")
    return _claim(f"matching epoch: {where}", f"matching epoch / epochs of LRnorm, {where}", compare, of_norm)


NORM = _cell("gap", "norm")
CONTROLS = [
    *(_difference(_cell(head, "fast"), NORM) for head in ("gap_lifted", "covariance")),
    _difference(_cell("gap", "fast", MATCHED), NORM),
    _difference(_cell("gcp", "fast"), _cell("gap_lifted", "fast")),
    _difference(_cell("gcp", "fast"), _cell("covariance", "fast")),
    _difference(_cell("gcp", "fast"), _cell("gap", "norm", MATCHED)),
]
ACCURACIES = [
    _difference(_cell("gcp", "adju"), NORM),
    *(_difference(_cell("gcp", kind), _cell("gap", kind)) for kind in WORDS),
]
EPOCHS = [_epoch(head, kind) for head in ("gcp", "gap") for kind in ("fast", "adju")] + [_epoch("gcp", "norm")]
# an accuracy of 1, which K-FAC reaches on digits, has no logit
KFAC = [
    _difference(_cell(head, kind, optimizer="kfac"), _cell(head, kind), "identity")
    for head in ("gap", "gcp")
    for kind in WORDS
]
EXPLORATORY = [*ACCURACIES, *EPOCHS, *KFAC]
SAYS = {
    "supported": "Under the fast schedule GCP ends above what GAP reaches under the normal one, in fewer epochs.",
    "contradicted": "Under the fast schedule GCP ends below what GAP reaches under the normal one.",
    "no effect": "Under the fast schedule GCP ends where GAP does under the normal one, in fewer epochs.",
}
CLAIMS = [primary(7).measured(with_sgd, SAYS), *CONTROLS, *EXPLORATORY]
