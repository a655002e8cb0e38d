"""Records with chosen values, and tables of values, for the tests of `studies.judge`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from studies.judge import Claim, Comparison, Ratio

GCP, GAP = {"head": "gcp"}, {"head": "gap"}
BELOW_GAP = Ratio(GCP, GAP, margin=0.1)


def table(cells: Mapping[str, Sequence[float]], network: str = "digits_net") -> pd.DataFrame:
    """Columns network, seed, head, value: one value for each head and seed, from seed 0 on."""
    rows = [(network, seed, head, v) for head, values in cells.items() for seed, v in enumerate(values)]
    return pd.DataFrame(rows, columns=["network", "seed", "head", "value"])


def ratios(logs: Iterable[float], network: str = "digits_net") -> pd.DataFrame:
    """Values whose log ratios GCP / GAP are these, on denominators that differ between seeds."""
    effects = np.asarray(list(logs))
    gap = 2.0 + np.arange(len(effects))
    return table({"gap": list(gap), "gcp": list(gap * np.exp(effects))}, network)


def scatter(mean: float, sd: float, n: int) -> np.ndarray:
    """n numbers with exactly this mean and standard deviation."""
    x = np.random.default_rng(n).normal(size=n)
    return mean + sd * (x - x.mean()) / x.std(ddof=1)


def records(
    values: pd.DataFrame, dataset: str = "digits", study: str = "landscape", quantity: str = "loss"
) -> pd.DataFrame:
    """The values as records of a study."""
    rest = {"trained_under": "", "optimizer": "sgd", "schedule": "resnet_norm", "step": 10, "layer": "", "index": -1}
    return values.assign(study=study, dataset=dataset, quantity=quantity, setting=np.nan, error=np.nan, **rest)


def claim(name: str = "smoother loss", compare: Comparison = BELOW_GAP, **changes: Any) -> Claim:
    """A claim on the records whose quantity is its name, or on all with quantity "loss"."""
    fields: dict[str, Any] = {"study": "landscape", "quantity": "loss, GCP / GAP", "primary": 1} | changes

    def values(table: pd.DataFrame) -> pd.DataFrame:
        return table[table.quantity == (name if name in set(table.quantity) else "loss")]

    return Claim(name, "GCP is smoother.", compare=compare, values=values, **fields)
