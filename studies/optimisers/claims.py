"""Steps to a target loss, and the claims that are judged on them.

T(L) is the step at which a smoothed training loss first is at most L, interpolated between the points of its curve (linear in the
logarithm of the loss). A run that never gets there is censored: it counts with one step more than it took, a lower bound.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd

from studies.engine.plan import SMOOTHED
from studies.judge import Claim, Interaction, Ratio, primary
from studies.judge.claims import Values
from studies.optimisers.autoencoder import NETWORK as DEEP
from studies.optimisers.settings import TUNING_SEED

TARGET, OF_SGD = "target loss", "time of a step, of SGD's"
PERIOD = 20
"""Timed steps at the end that stand for all later ones: two intervals between renewals of K-FAC's factors."""
KEYS = ["network", "head", "optimizer", "seed"]


def reported(records: pd.DataFrame) -> pd.DataFrame:
    """Records of the networks that were trained with the tuned settings."""
    return records[(records.seed < TUNING_SEED) & (records.network != DEEP)]


def targets(records: pd.DataFrame) -> list[float]:
    """The training losses that were fixed beforehand, largest first."""
    return sorted(records[records.quantity == TARGET].value.unique().tolist(), reverse=True)


def steps_to(steps: np.ndarray, losses: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """T at each level, for losses `[n]` after `steps` `[n]`; inf where it is never reached, nan where the curve begins below."""
    lowest = -np.log(np.minimum.accumulate(losses))
    return np.interp(-np.log(levels), lowest, steps, left=math.nan, right=math.inf)


def _reached(runs: pd.DataFrame, levels: Callable[[pd.DataFrame], Sequence[float]]) -> pd.DataFrame:
    """T of each run at its levels: KEYS, level, value, censored; at all levels where training diverged."""
    rows = []
    for key, run in runs.groupby(KEYS, sort=False):
        lost = (run.quantity == "diverged").any()
        last = runs.step.max() if lost else run.step.max()
        wanted = levels(run)
        found = np.full(len(wanted), math.inf) if lost else steps_to(run.step.to_numpy(), run.value.to_numpy(), wanted)
        rows += [(*key, L, min(T, last + 1.0), math.isinf(T)) for L, T in zip(wanted, found, strict=True)]
    return pd.DataFrame(rows, columns=[*KEYS, "level", "value", "censored"])


def at_levels(records: pd.DataFrame, levels: Sequence[float]) -> pd.DataFrame:
    """T of each reported network: KEYS, level, value, censored; censored at all levels where training diverged."""
    part = reported(records)
    return _reached(part[part.quantity.isin((SMOOTHED, "diverged"))].sort_values("step"), lambda run: levels)


def to_targets(records: pd.DataFrame) -> pd.DataFrame:
    """The geometric mean of T over the targets of each reported network: KEYS, value, censored."""
    return _over_targets(at_levels(records, targets(records)))


def seconds_to_targets(records: pd.DataFrame) -> pd.DataFrame:
    """As `to_targets` the time until T, in steps of SGD: KEYS, value, censored; nan of optimisers that were not timed."""
    table = at_levels(records, targets(records))
    timed = records[records.quantity == OF_SGD].sort_values("index").groupby(["head", "optimizer"]).value
    times = {cell: values.to_numpy() for cell, values in timed}
    cells = zip(table["head"], table.optimizer, strict=True)
    spent = [time_of(T, times.get(cell, np.array([math.nan]))) for cell, T in zip(cells, table.value, strict=True)]
    return _over_targets(table.assign(value=spent))


def time_of(steps: float, times: np.ndarray) -> float:
    """The time of so many steps, from those of the first ones `[n]`; each later one takes the mean of the last `PERIOD`.

    The first steps of K-FAC take longest: while it warms up, its factors are renewed in most of them.
    """
    whole = np.concatenate([[0.0], np.cumsum(times)])
    later = max(0.0, steps - len(times))
    return float(np.interp(steps, np.arange(len(whole)), whole) + later * times[-PERIOD:].mean())


def _over_targets(table: pd.DataFrame) -> pd.DataFrame:
    """The geometric mean of each run over its levels."""
    runs = table.assign(value=np.log(table.value)).groupby(KEYS, sort=False)
    # a mean that leaves out a target is of other targets than those it is compared with
    means = runs.value.agg(lambda logs: math.exp(logs.mean(skipna=False))).reset_index()
    return means.assign(censored=runs.censored.any().to_numpy())


def final(records: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A quantity of the last epoch of each reported network: KEYS, value; infinite where training diverged."""
    part = reported(records)
    lost = part[part.quantity == "diverged"].drop_duplicates(KEYS).assign(value=math.inf)
    ends = part[part.quantity == quantity].sort_values("step").drop_duplicates(KEYS, keep="last")
    return pd.concat([ends, lost])[[*KEYS, "value"]]


def autoencoders(records: pd.DataFrame) -> pd.DataFrame:
    """Training losses of the reported autoencoders, in the order of steps."""
    part = records[(records.network == DEEP) & (records.seed < TUNING_SEED) & (records.quantity == "train_loss")]
    return part.sort_values("step", kind="stable")


def updates(records: pd.DataFrame) -> pd.DataFrame:
    """Updates of each autoencoder to the loss that SGD ends at on the same seed: KEYS, level (that loss), value, censored."""
    runs = autoencoders(records)
    ends = runs[runs.optimizer == "sgd"].groupby("seed").value.last()
    return _reached(runs[runs.seed.isin(ends.index)], lambda run: [float(ends[run.seed.iloc[0]])])


SGD, KFAC = {"optimizer": "sgd"}, {"optimizer": "kfac"}
GAP, GCP = {"head": "gap"}, {"head": "gcp"}


def _interaction(
    of: str, to: str, optimizer: str = "kfac", values: Values = to_targets, what: str = "steps to the targets"
) -> Claim:
    return Claim(
        f"{optimizer}: {what}, {of} - {to}",
        "Does the second-order optimiser help less where the head is this one?",
        "optimisers",
        f"log of {what}, sgd / {optimizer}, {of} - {to}",
        Interaction({"head": of}, {"head": to}, SGD, {"optimizer": optimizer}),
        values,
    )


def _ratio(name: str, of: Mapping[str, str], to: Mapping[str, str], values: Values = to_targets) -> Claim:
    return Claim(name, "How many steps, against those of the other?", "optimisers", name, Ratio(of, to), values)


CONTRASTS = (("gcp", "gap_lifted"), ("gap_lifted", "gap"), ("gcp", "covariance"), ("covariance", "gap"))
CONTROLS = [_interaction(of, to) for of, to in CONTRASTS]
FURTHER = [
    _interaction("gcp", "gap", "gauss_newton"),
    _interaction("gcp", "gap", values=partial(final, quantity="train_loss"), what="final loss"),
    _ratio("steps under GAP, K-FAC / SGD", GAP | KFAC, GAP | SGD),
    _ratio("steps under GCP, K-FAC / SGD", GCP | KFAC, GCP | SGD),
    _ratio("steps with SGD, GCP / GAP", GCP | SGD, GAP | SGD),
]
DEEP_CLAIMS = [
    _ratio("updates, K-FAC / SGD", KFAC, SGD, updates),
    _ratio("updates, quadratic K-FAC / SGD", {"optimizer": "kfac_quadratic"}, SGD, updates),
]
SAYS = {
    "supported": "K-FAC speeds up GCP less than GAP, as it would if GCP did already what second-order steps do.",
    "contradicted": "K-FAC speeds up GCP more than GAP: GCP does not make second-order steps superfluous.",
    "no effect": "K-FAC speeds up GCP as much as GAP: GCP does not make second-order steps superfluous.",
}
CLAIMS = [primary(6).measured(to_targets, SAYS), *CONTROLS, *FURTHER, *DEEP_CLAIMS]
