"""
Reading a report
================

A study's table is one schema for every number. It is read with a check that nobody changed a number, and any
comparison can be judged on it as the claims of the report are.
"""

from pathlib import Path

import pandas as pd

from secondorder.robustness import CORRUPTIONS
from studies.engine.records import read_records
from studies.judge import Claim, Ratio, judge

reports = Path("reports") if Path("reports").exists() else Path("../reports")
records, origins = read_records(reports / "quick", "robustness")
print(origins.words(records.seed))

# %%
# Is a network under GCP more robust to noise? One value for each seed and head, paired by seed.
noises = [name for name, row in CORRUPTIONS.items() if row.group == "noise" and not row.extra]


def noise_error(table: pd.DataFrame) -> pd.DataFrame:
    """The mean error on noisy images of each network."""
    part = table[(table.quantity == "corrupted error") & table.layer.isin(noises)]
    return part.groupby(["network", "head", "seed"]).value.mean().reset_index()


ratio = Ratio({"head": "gcp"}, {"head": "gap"}, margin=0.05)
claim = Claim("robust to noise", "Fewer errors on noisy images.", "robustness", "error", ratio, noise_error)
print(judge([claim], records)[0].estimate)
