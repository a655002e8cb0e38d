"""What the transfer study compares: from its records to one value for each pretrained network.

The pretraining is told by `trained_under`: a head, or "" for the initial weights.
"""

from functools import partial

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from secondorder.errors import InputError
from studies.judge import NOT_MEASURED, Claim, Difference, primary
from studies.judge.claims import Values
from studies.judge.matched import KEYS, at_matched
from studies.transfer.detectors import FROZEN
from studies.transfer.probes import FOREGROUND, PROBE

NETWORK = ["network", "dataset", "trained_under", "seed"]
RANDOM = "random"
"""What initial weights are called beside heads."""
MARGIN = 0.005
PROBES = [*PROBE.values(), FOREGROUND]


def score(records: pd.DataFrame, quantity: str, data: str = "") -> pd.DataFrame:
    """The mean of a quantity over data sets (or of one) and settings, of the networks that have them all (NETWORK, value).

    InputError for two values of a network on the same data set and setting.
    """
    part = records[(records.quantity == quantity) & ((records.layer == data) | (data == ""))]
    if part.empty:
        return pd.DataFrame(columns=[*NETWORK, "value"])
    if (twice := part.duplicated([*NETWORK, "layer", "setting"])).any():
        raise InputError(
            f"{part[twice].layer.iloc[0]} has two values of {quantity} for one network, of annotations that have changed "
            "since; choose another --out, or replace the table with --fresh"
        )
    table = part.pivot(index=NETWORK, columns=["layer", "setting"], values="value").dropna()
    return table.mean(axis=1).rename("value").reset_index()


def pretraining_accuracy(records: pd.DataFrame) -> pd.DataFrame:
    """Test top-1 of each network after the last epoch of its pretraining (NETWORK, value)."""
    epochs = records[records.quantity == "test_top1"].sort_values("index")
    return epochs.groupby(NETWORK, sort=False).value.last().reset_index()


def with_accuracy(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """`score` beside the `accuracy` of the pretraining; random networks have none and are left out."""
    accuracy = pretraining_accuracy(records).rename(columns={"value": "accuracy"})
    return score(records, quantity).merge(accuracy, on=NETWORK)


def at_matched_accuracy(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The score (NETWORK, value) that each network would have with the mean pretraining accuracy of its architecture.

    Analysis of covariance (`at_matched`) of logit(score) on logit(accuracy).
    """
    table = with_accuracy(records, quantity)
    inside = [table[column].between(0, 1, inclusive="neither") for column in ("value", "accuracy")]
    table = table[np.logical_and.reduce(inside)].rename(columns={"trained_under": "head"})
    columns = {name: logit(table[of].astype(float)) for name, of in (("x", "accuracy"), ("y", "value"))}
    found = at_matched(table[KEYS].assign(**columns))
    return found.rename(columns={"head": "trained_under"})[NETWORK].assign(value=expit(found.y.astype(float)))


def _contrast(name: str, values: Values, of: str = "gcp", to: str = "gap") -> Claim:
    words = f"{of or RANDOM} - {to or RANDOM}"
    compare = Difference({"trained_under": of}, {"trained_under": to}, margin=MARGIN, scale="logit")
    statement = (
        f"Is it larger after training under {of} than {'after training under ' + to if to else 'at initial weights'}?"
    )
    return Claim(f"{name}: {words}", statement, "transfer", f"{name}, {words}", compare, values)


BOX, MASK = "box AP", "mask AP"
PAIRS = (("gcp", "gap_lifted"), ("gap_lifted", "gap"), ("gcp", "covariance"), ("covariance", "gap"))
CONTROLS = [
    _contrast(f"{BOX} at matched pretraining accuracy", partial(at_matched_accuracy, quantity=BOX)),
    *(_contrast(BOX, partial(score, quantity=BOX), *pair) for pair in PAIRS),
]
DETECTION = [
    *(_contrast(BOX, partial(score, quantity=BOX), head, "") for head in ("gap", "gcp")),
    *(
        _contrast(quantity, partial(score, quantity=quantity))
        for quantity in (MASK, f"{BOX}{FROZEN}", f"{MASK}{FROZEN}")
    ),
    *(_contrast(f"{BOX}{FROZEN}", partial(score, quantity=f"{BOX}{FROZEN}"), head, "") for head in ("gap", "gcp")),
]
PROBED = [
    _contrast(quantity, partial(score, quantity=quantity), *pair)
    for quantity in PROBES
    for pair in (("gcp", "gap"), *PAIRS[:2], ("gap", ""), ("gcp", ""))
]
MATCHED = [
    _contrast(f"{quantity} at matched pretraining accuracy", partial(at_matched_accuracy, quantity=quantity))
    for quantity in PROBES
]
SAYS = {
    "supported": "A detector that is fine-tuned from a GCP backbone is more precise.",
    "contradicted": "A detector that is fine-tuned from a GCP backbone is less precise.",
    "no effect": "A detector is as precise, whichever head its backbone was trained under.",
    NOT_MEASURED: "Not measured: no detector was trained at this scale, only probes of frozen features, which are below.",
}
CLAIMS = [primary(9).measured(partial(score, quantity=BOX), SAYS), *CONTROLS, *DETECTION, *PROBED, *MATCHED]
