"""What the curvature study compares between heads: from its records to one value for each network, head and seed.

A value is the geometric mean over the three convolutions. A trained network counts only if its test accuracy is the stated one or
better; one that falls short has no value, so that its seed is left out and counted.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import pandas as pd

from studies.curvature.measures import CONDITION, HESSIAN, KFAC, PUT_ON, SPREAD, SQUARED
from studies.judge import Claim, contrast, primary

ACCURACY = "stated accuracy"
"""Quantity of the records that say which test accuracy a network needs to count."""
KEYS = ["network", "dataset", "seed", "head"]


def accuracies(records: pd.DataFrame) -> pd.DataFrame:
    """Test top-1 of each trained network (KEYS, value, stated), after its last epoch, beside what is asked of it."""
    top1 = (
        records[records.quantity == "test_top1"]
        .sort_values("index", kind="stable")
        .groupby(KEYS, sort=False)
        .value.last()
    )
    stated = records[records.quantity == ACCURACY].groupby(KEYS, sort=False).value.last()
    return pd.concat({"value": top1, "stated": stated}, axis=1).dropna().reset_index()


def trained(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A quantity of the trained networks (KEYS, value); nan for a network below its stated accuracy, empty if all are."""
    found = mean_over_layers(records[(records.quantity == quantity) & (records.trained_under != "")])
    reached = accuracies(records).pipe(lambda table: table[table.value >= table.stated])
    found["value"] = found.value.where(found.set_index(KEYS).index.isin(reached.set_index(KEYS).index))
    return found if found.value.notna().any() else found.iloc[:0]


def initial(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A quantity of networks at their initial weights (KEYS, value)."""
    return mean_over_layers(records[(records.quantity == quantity) & (records.trained_under == "")])


def put_on(records: pd.DataFrame, trained_under: str) -> pd.DataFrame:
    """The condition of heads that are put on backbones trained under one of them (KEYS, value)."""
    return mean_over_layers(records[(records.quantity == PUT_ON) & (records.trained_under == trained_under)])


def mean_over_layers(records: pd.DataFrame) -> pd.DataFrame:
    """The geometric mean over layers (KEYS, value), not finite where one of them is not."""
    with np.errstate(divide="ignore"):
        logs = records.assign(value=np.log(records.value.astype(float)))
    mean = logs.groupby(KEYS, sort=False).value.agg(lambda values: values.mean(skipna=False)).reset_index()
    return mean.assign(value=np.exp(mean.value))


WEIGHTS = {
    "after training": partial(trained, quantity=CONDITION),
    "initial weights": partial(initial, quantity=CONDITION),
    "backbone trained under GAP": partial(put_on, trained_under="gap"),
    "backbone trained under GCP": partial(put_on, trained_under="gcp"),
}
"""Weights at which the condition is compared -> from records to values."""


def _contrast(name: str, quantity: str, values: partial[pd.DataFrame], of: str = "gcp", to: str = "gap") -> Claim:
    """An exploratory comparison of two heads."""
    return contrast(name, "curvature", quantity, values, of, to, margin=0.2)


LAMBDA = "lambda_1 / lambda_k of GGN blocks"
AFTER = WEIGHTS["after training"]
CONTROLS = [
    _contrast("conditioning of blocks", LAMBDA, AFTER, of, to)
    for of, to in (("gcp", "covariance"), ("gcp", "gap_lifted"), ("gap_lifted", "gap"), ("gcp_exact", "gap"))
]
EXACT = _contrast("conditioning of blocks", LAMBDA, AFTER, "gcp_exact", "gcp")
WITHOUT_SOFTMAX = _contrast(
    "conditioning without the softmax", f"{LAMBDA}, squared error", partial(trained, quantity=SQUARED)
)
OTHER_WEIGHTS = [
    _contrast(f"conditioning, {weights}", f"{LAMBDA}, {weights}", values)
    for weights, values in WEIGHTS.items()
    if values is not AFTER
]
OTHER_MEASURE = _contrast(
    "largest / mean eigenvalue", "lambda_1 r / tr of GGN blocks", partial(trained, quantity=SPREAD)
)
FIDELITY = _contrast(
    "K-FAC's fidelity", "cosine of K-FAC and GGN blocks, after training", partial(trained, quantity=KFAC)
)
OUTSIDE = _contrast(
    "Hessian outside the GGN", "|H - G| / |H|, last convolution, initial weights", partial(initial, quantity=HESSIAN)
)
SAYS: Mapping[str, str] = {
    "supported": "The GGN blocks of the weights below GCP are better conditioned than below GAP.",
    "contradicted": "The GGN blocks of the weights below GCP are worse conditioned than below GAP.",
    "no effect": "The GGN blocks of the weights are as well conditioned below GCP as below GAP.",
    "not measured": "Not measured: no network was trained to the stated accuracy under both heads.",
}
CLAIMS = [
    primary(4).measured(AFTER, SAYS),
    *CONTROLS,
    EXACT,
    WITHOUT_SOFTMAX,
    *OTHER_WEIGHTS,
    OTHER_MEASURE,
    FIDELITY,
    OUTSIDE,
]
