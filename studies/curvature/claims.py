"""What the curvature study compares between heads: from its records to one value for each network, head and seed.

A value is the geometric mean over the three convolutions. A trained network counts only if its test accuracy is the stated one or
better; one that falls short has no value, so that its seed is left out and counted.
"""

from functools import partial

import pandas as pd
from scipy.stats import gmean

from studies.curvature.measures import CONDITION, HESSIAN, KFAC, PUT_ON, SPREAD, SQUARED
from studies.judge import contrast, primary

ACCURACY = "stated accuracy"
"""Quantity of the records that say which test accuracy a network needs to count."""
KEYS = ["network", "dataset", "seed", "head"]


def accuracies(records: pd.DataFrame) -> pd.DataFrame:
    """Test top-1 of each trained network (KEYS, value, stated), after its last epoch, beside what is asked of it."""
    ordered = records.sort_values("index", kind="stable")
    top1, stated = (
        ordered[ordered.quantity == quantity].groupby(KEYS, sort=False).value.last()
        for quantity in ("test_top1", ACCURACY)
    )
    return pd.concat({"value": top1, "stated": stated}, axis=1).dropna().reset_index()


def trained(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A quantity of the trained networks (KEYS, value); nan for a network below its stated accuracy, empty if all are."""
    found = mean_over_layers(records[(records.quantity == quantity) & (records.trained_under != "")])
    reached = accuracies(records).query("value >= stated")[KEYS].assign(reached=True)
    found = found.merge(reached, how="left")
    found = found.assign(value=found.value.where(found.pop("reached").notna()))
    return found if found.value.notna().any() else found.iloc[:0]


def of_weights(records: pd.DataFrame, quantity: str, trained_under: str = "") -> pd.DataFrame:
    """A quantity (KEYS, value) of networks whose weights were trained under a head, unless they are the initial ones."""
    return mean_over_layers(records[(records.quantity == quantity) & (records.trained_under == trained_under)])


def mean_over_layers(records: pd.DataFrame) -> pd.DataFrame:
    """The geometric mean over layers (KEYS, value), not finite where one of them is not."""
    return records.groupby(KEYS, sort=False).value.agg(gmean).reset_index()


WEIGHTS = {
    "after training": partial(trained, quantity=CONDITION),
    "initial weights": partial(of_weights, quantity=CONDITION),
    "backbone trained under GAP": partial(of_weights, quantity=PUT_ON, trained_under="gap"),
    "backbone trained under GCP": partial(of_weights, quantity=PUT_ON, trained_under="gcp"),
}
"""Weights at which the condition is compared -> from records to values."""
AFTER, *OTHERS = WEIGHTS
LAMBDA = "lambda_1 / lambda_k of GGN blocks"
SAYS = {
    "supported": "The GGN blocks of the weights below GCP are better conditioned than below GAP.",
    "contradicted": "The GGN blocks of the weights below GCP are worse conditioned than below GAP.",
    "no effect": "The GGN blocks of the weights are as well conditioned below GCP as below GAP.",
    "not measured": "Not measured: no network was trained to the stated accuracy under both heads.",
}
_contrast = partial(contrast, study="curvature", margin=0.2)
EXACT, *CONTROLS = [
    _contrast("conditioning of blocks", quantity=LAMBDA, values=WEIGHTS[AFTER], of=of, to=to)
    for of, to in (
        ("gcp_exact", "gcp"),
        ("gcp", "covariance"),
        ("gcp", "gap_lifted"),
        ("gap_lifted", "gap"),
        ("gcp_exact", "gap"),
    )
]
WITHOUT_SOFTMAX, OTHER_MEASURE, FIDELITY, OUTSIDE, *OTHER_WEIGHTS = [
    _contrast(name, quantity=quantity, values=values)
    for name, quantity, values in (
        ("conditioning without the softmax", f"{LAMBDA}, squared error", partial(trained, quantity=SQUARED)),
        ("largest / mean eigenvalue", "lambda_1 r / tr of GGN blocks", partial(trained, quantity=SPREAD)),
        ("K-FAC's fidelity", "cosine of K-FAC and GGN blocks, after training", partial(trained, quantity=KFAC)),
        (
            "Hessian outside the GGN",
            "|H - G| / |H|, last convolution, initial weights",
            partial(of_weights, quantity=HESSIAN),
        ),
        *((f"conditioning, {weights}", f"{LAMBDA}, {weights}", WEIGHTS[weights]) for weights in OTHERS),
    )
]
CLAIMS = [
    primary(4).measured(WEIGHTS[AFTER], SAYS),
    *(*CONTROLS, EXACT, WITHOUT_SOFTMAX, *OTHER_WEIGHTS, OTHER_MEASURE, FIDELITY, OUTSIDE),
]
