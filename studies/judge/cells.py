"""Cells of the records, such as {"head": "gcp"}, and the checks of records and cells."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from numbers import Real

import pandas as pd

from secondorder.errors import InputError, check_known, short
from secondorder.pooling import POOLINGS

Cell = Mapping[str, str | float]

NEEDED = ("study", "network", "dataset", "seed")
"""Columns of the records that are empty in none."""
CELL_COLUMNS = ("head", "trained_under", "optimizer", "schedule", "step", "layer", "quantity", "index", "setting")
"""Those that tell cells apart."""


def check_records(records: pd.DataFrame) -> None:
    """InputError unless the records are a table with the columns of every study, whose heads are known."""
    check_columns("the records", records, (*NEEDED, *CELL_COLUMNS, "value", "error"))
    for column in NEEDED:
        if (gaps := records[column].isna()).any():
            raise InputError(f"the records have no {column} in row {gaps.to_numpy().argmax()}: every number needs one")
    for column in ("head", "trained_under"):
        for name in records[column].unique():
            _check_head(column, name)


def check_columns(what: str, table: object, columns: Sequence[str]) -> None:
    """InputError unless this is a table that has these columns."""
    if not isinstance(table, pd.DataFrame):
        raise InputError(f"{what}: must be a pandas DataFrame, not {short(table)}")
    if missing := [column for column in columns if column not in table.columns]:
        there = ", ".join(map(str, table.columns)) or "none"
        raise InputError(f"{what} lack the columns {', '.join(missing)}; they have {there}")


def check_cells(**cells: Cell) -> None:
    """InputError unless each maps columns to words or numbers, all the same columns, and no two are the same cell.

    The columns are of CELL_COLUMNS, at least one; heads must be known.
    """
    for name, cell in cells.items():
        if not isinstance(cell, Mapping) or not cell:
            raise InputError(f"{name} {short(cell)}: must map columns to values, such as {{'head': 'gcp'}}")
        for column, value in cell.items():
            check_known(f"column in {name}", column, CELL_COLUMNS)
            if not isinstance(value, str | Real):
                raise InputError(f"{name}: {column} {short(value)} must be a word or a number")
            _check_head(column, value)
    for (name, cell), (other, second) in combinations(cells.items(), 2):
        if {*cell} != {*second}:
            columns = f"{', '.join(cell)} and {', '.join(second)}"
            raise InputError(f"{name} and {other} must name the same columns, not {columns}")
        if dict(cell) == dict(second):
            raise InputError(f"{name} and {other} are the same cell, {words(cell)}: nothing to compare")


def words(cell: Cell) -> str:
    """The cell for a message: ``head gcp, optimizer kfac``."""
    return ", ".join(f"{column} {value}" for column, value in cell.items())


def _check_head(column: str, name: object) -> None:
    if column in ("head", "trained_under") and name != "":
        check_known(column.replace("_", " "), name, POOLINGS)
