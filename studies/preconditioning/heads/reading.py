"""What the section and the figure of part A read from the table: numbers by head and backbone, at the end of training."""

import numpy as np
import pandas as pd

PUBLISHED = 5
"""Newton-Schulz steps of the published head."""
OTHERS = ("covariance", "power 1/4", "power 3/4", "logarithm")
"""Heads by name that are neither the root nor an approximation of it."""


def prepared(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of part A with the setting as a number and the head's `name` for a reader."""
    setting = pd.to_numeric(table.setting, errors="coerce")
    pairs = zip(table["head"], setting, strict=True)
    return table.assign(setting=setting, name=[head_name(str(head), float(value)) for head, value in pairs])


def head_name(head: str, setting: float) -> str:
    """The name of a head with its option, e.g. ``5 steps``."""
    if head == "gcp":
        return f"{setting:g} step{'s' if setting > 1 else ''}"
    if head == "gcp_power":
        return f"power {int(4 * setting)}/4" if setting in (0.25, 0.75) else f"power {setting:g}"
    return {"covariance": "covariance", "gcp_exact": "exact root", "gcp_log": "logarithm"}.get(head, head)


def per_seed(table: pd.DataFrame, name: str, measure: str, of_many: str = "mean") -> pd.DataFrame:
    """One number for each seed (rows) and backbone (columns) of a head by its name; `of_many` rows, their mean or max."""
    some = table[(table.name == name) & (table.measure == measure)]
    columns = list(some.backbone.unique())
    return some.groupby(["seed", "backbone"]).value.agg(of_many).unstack()[columns].dropna() if columns else some[[]]


def geometric_mean(values: pd.Series) -> float:
    """exp of the mean logarithm."""
    return float(np.exp(np.log(values).mean()))
