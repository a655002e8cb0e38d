"""The numbers of part C from its rows: means over convolutions and mini-batches, one for each seed, and intervals."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from secondorder.kfac.options import DAMPING
from secondorder.preconditioning import bootstrap_interval
from studies.preconditioning.directions.measure import ALL, CONTROLS, NATURAL, WHOLE
from studies.statistics import Interval, mean_interval

BACKBONES = ("untrained", "gap", "gcp")
"""Their order; others come after them."""
GAIN = "gain"
"""The measure cos(g_head, P g_gap) - cos(g_head, g_gap)."""
Setting = float | str
"""A damping of K-FAC, NATURAL, or PLAIN where there is no preconditioner."""
PLAIN = ""
EMPTY = pd.Series(dtype=float)


class Readings:
    """The rows of part C, with GAIN, sorted by what is asked of them."""

    def __init__(self, table: pd.DataFrame) -> None:
        table = _with_gain(table.assign(setting=[_setting(word) for word in table.setting.fillna(PLAIN)]))
        found = list(table.backbone.unique())
        self.table = table
        self.backbones = [b for b in BACKBONES if b in found] + [b for b in found if b not in BACKBONES]
        self.controls = [head for head in CONTROLS if (table["head"] == head).any()]
        self.dampings = sorted({s for s in table.setting if isinstance(s, float)})
        self.default = min(self.dampings, key=lambda value: abs(np.log(value / DAMPING)))
        """The optimiser's default damping, or what is nearest to it (as a ratio) in the sweep."""
        single = table[table.layer != ALL]
        whole = single.batch == WHOLE
        by = ["backbone", "measure", "head", "setting"]
        self._rows = dict(list(single[~whole].groupby(by, sort=False)))
        self._whole_rows = dict(list(single[whole].groupby(by, sort=False)))

    @property
    def natural(self) -> bool:
        """Whether there is a natural gradient."""
        return any(setting == NATURAL for *_, setting in self._whole_rows)

    def rows(self, backbone: str, measure: str, head: str, setting: Setting) -> pd.DataFrame:
        """Those of single convolutions and mini-batches."""
        return self._rows.get((backbone, measure, head, setting), self.table[:0])

    def per_seed(self, backbone: str, measure: str, head: str, setting: Setting, batches: bool = False) -> pd.Series:
        """Mean over convolutions by seed, of the reference images' gradient; over the mini-batches, too, if asked."""
        rows = (self._rows if batches else self._whole_rows).get((backbone, measure, head, setting))
        return EMPTY if rows is None else rows.groupby(["seed", "layer"]).value.mean().groupby("seed").mean()

    def average(self, backbone: str, measure: str, head: str, setting: Setting, batches: bool = False) -> float:
        """Mean over seeds; nan where there is nothing."""
        return float(self.per_seed(backbone, measure, head, setting, batches).mean())

    def interval(
        self, backbone: str, measure: str, setting: Setting, control: str = "", batches: bool = False
    ) -> Interval:
        """GCP's over seeds; its difference to a control where one is given."""
        values = self.per_seed(backbone, measure, "gcp", setting, batches)
        if control:
            values = (values - self.per_seed(backbone, measure, control, setting, batches)).dropna()
        return mean_interval(values)

    def layers(self, backbone: str, measure: str, head: str, setting: Setting) -> pd.DataFrame:
        """Rows of the reference images' gradient."""
        return self._whole_rows.get((backbone, measure, head, setting), self.table[:0])

    def best(self, backbone: str, measure: str, control: str = "") -> float:
        """The damping with the largest mean over seeds."""
        return max(self.dampings, key=lambda d: self.interval(backbone, measure, d, control).estimate)


def _setting(word: object) -> Setting:
    """As it was before it was written into a table."""
    return str(word) if word in (PLAIN, NATURAL) else float(str(word))


def _with_gain(table: pd.DataFrame) -> pd.DataFrame:
    keys = ["backbone", "seed", "layer", "head", "batch"]
    plain = table[table.measure == "plain"].set_index(keys).value.rename("plain")
    turned = table[table.measure == "preconditioned"].join(plain, on=keys, how="inner")
    gains = turned.assign(value=turned.value - turned.plain, measure=GAIN).drop(columns="plain")
    return pd.concat([table, gains], ignore_index=True)


def band(values: Sequence[float] | pd.Series) -> tuple[float, float, float]:
    """Mean and its bootstrap interval; the mean alone where there is one value."""
    x = np.asarray(values, dtype=float)
    if x.size < 2:
        return float(x.mean()), float(x.mean()), float(x.mean())
    found = bootstrap_interval(x)
    return found.estimate, found.low, found.high
