"""Records: every measured number of every study as one row of one schema, and their tables, which are a cache.

A table's records carry the key of the measurement that they are of: run, step, measurement, its settings and version. A
measurement whose key stands in the table is not computed again: days of work can be done in slices, on changing machines.
"""

import gzip
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from secondorder.atomic import read_regular
from secondorder.errors import InputError
from studies.results import DIGITS, read_table, table_file, write_file, write_table

WORDS = {"network": "", "head": "", "trained_under": "", "dataset": "", "optimizer": "", "schedule": ""}
NUMBERS = {"seed": 0, "step": 0}
MEASURED = {"layer": "", "quantity": "", "index": -1, "setting": math.nan, "value": math.nan, "error": math.nan}
COLUMNS = ("study", *WORDS, *NUMBERS, *MEASURED, "key")
"""study; network, head that is measured, trained_under (the head of the training; "" at initial weights), dataset, optimizer and
schedule of the training; seed; step, training steps done; layer ("": the whole network), quantity, index in a list of values
(-1: a single one), setting, which is varied (NaN: nothing), value, error (0: exact, NaN: not known); key of the measurement."""
Row = Mapping[str, Any]
"""A measured number: any of the columns but study and key; `quantity` and `value` must be there."""


@dataclass
class Origins:
    """Where the records of a table come from, by the key of their measurement: enough to run them again."""

    study: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the last command that wrote the table."""
    data: dict[str, Any] = field(default_factory=dict)
    machines: list[dict[str, Any]] = field(default_factory=list)
    """Commit, versions, device, threads: one for each combination that computed something."""
    measurements: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Key -> seconds of the measurement, and the number of its machine."""
    trainings: dict[str, float] = field(default_factory=dict)
    """Entry of the store -> seconds of training, wherever and whenever they were spent."""
    sha256: str = ""
    """Of the table's text."""

    @property
    def seconds(self) -> float:
        """Of all trainings and measurements together."""
        return sum(self.trainings.values()) + sum(seconds for seconds, _ in self.measurements.values())

    def words(self, seeds: Iterable[float]) -> str:
        """A sentence for a reader: versions, commits, devices, threads, seconds and seeds; "" before anything was computed."""
        if not self.machines:
            return ""
        versions = ", ".join(f"{package} {version}" for package, version in self.machines[-1]["versions"].items())
        commits = sorted({machine["commit"] for machine in self.machines})
        short = ", ".join(commit[:12] + "+changes" * commit.endswith("+changes") for commit in commits)
        devices = "; ".join(sorted({machine["device"] for machine in self.machines}))
        return (
            f"Measured with {versions}; commit {short}; {devices}, {max(machine['threads'] for machine in self.machines)} "
            f"thread(s); {self.seconds:.0f} s; seeds {', '.join(map(str, sorted({int(seed) for seed in seeds})))}."
        )

    def add(self, key: str, seconds: float, machine: Mapping[str, Any]) -> None:
        """Note who computed the records of a key."""
        if dict(machine) not in self.machines:
            self.machines.append(dict(machine))
        self.measurements[key] = (round(seconds, 3), self.machines.index(dict(machine)))


def frame(study: str, rows: Iterable[Row], labels: Row, key: str) -> pd.DataFrame:
    """Rows of a measurement as records; `labels` are of all of them, unless a row says otherwise.

    Numbers have the digits of a table's file, so that what is chosen by them is chosen again when the table is read.
    """
    table = pd.DataFrame([{**WORDS, **NUMBERS, **MEASURED, **labels, **row} for row in rows], columns=[*COLUMNS[1:-1]])
    for column in ("setting", "value", "error"):
        table[column] = [float(f"{value:{DIGITS}}") for value in table[column]]
    table.insert(0, "study", study)
    return table.assign(key=key)


def write_records(folder: Path, study: str, records: pd.DataFrame, origins: Origins) -> None:
    """``<study>.csv``, compressed when it is large, and ``<study>.json``, origins and digest; InputError if that fails."""
    write_table(folder, study, records)
    origins.sha256 = _digest(folder, study)
    write_file(folder / f"{study}.json", json.dumps(asdict(origins), indent=1, default=str) + "\n")


def has_records(folder: Path, study: str) -> bool:
    """Whether there is a table, readable or not."""
    file = table_file(folder, study)
    return file is not None and file.exists()


def read_records(folder: Path, study: str) -> tuple[pd.DataFrame, Origins]:
    """The records of a study and their origins.

    InputError when there are none, they are damaged, or table and digest do not belong together: a number that was changed.
    """
    table = read_table(folder, study, COLUMNS, mixed=COLUMNS)
    path = folder / f"{study}.json"
    way_out = f"restore {study}.csv and {path.name}, or run the study again with --fresh"
    try:
        content = json.loads(read_regular(path))
        origins = Origins(**content)
        origins.measurements = {key: (float(s), int(machine)) for key, (s, machine) in origins.measurements.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} does not say where the results come from ({error}); {way_out}") from None
    if _digest(folder, study) != origins.sha256:
        raise InputError(f"{folder / study}.csv is not the table that was written there; {way_out}")
    words = {
        name: table[name].astype(object).fillna("").astype(str)
        for name in ("study", *WORDS, "layer", "quantity", "key")
    }
    return table.assign(**words)[[*COLUMNS]], origins


def _digest(folder: Path, study: str) -> str:
    file = table_file(folder, study)
    assert file is not None
    content = read_regular(file)
    return hashlib.sha256(gzip.decompress(content) if file.suffix == ".gz" else content).hexdigest()
