"""Cells of the records, such as {"head": "gcp"}, and the checks of what a comparison is made of."""

from collections.abc import Mapping, Sequence
from numbers import Real

import pandas as pd

from secondorder.errors import InputError, check_known, short
from secondorder.pooling import POOLINGS

Cell = Mapping[str, str | float]

BELOW, ABOVE, WITHIN = "below", "above", "within"
COLUMNS = (
    *(
        "study",
        "network",
        "head",
        "trained_under",
        "dataset",
        "optimizer",
        "schedule",
        "seed",
        "step",
        "layer",
        "quantity",
    ),
    *("index", "setting", "value", "error"),
)
"""Columns of the records of every study."""
CELL_COLUMNS = ("head", "trained_under", "optimizer", "schedule", "step", "layer", "quantity", "index", "setting")
"""Those that tell cells apart."""
HEADS = tuple(dict.fromkeys((*POOLINGS, "gap_lifted")))
"""Heads that records may name."""


def check_records(records: pd.DataFrame) -> None:
    """InputError unless the records are a table with COLUMNS whose heads are known."""
    check_columns("the records", records, COLUMNS)
    for column in ("study", "network", "dataset", "seed"):
        if (gaps := records[column].isna()).any():
            raise InputError(f"the records have no {column} in row {gaps.to_numpy().argmax()}: every number needs one")
    for column in ("head", "trained_under"):
        for name in records[column].unique():
            _check_head(column, name)


def check_columns(what: str, table: object, columns: Sequence[str]) -> None:
    """InputError unless this is a table that has these columns."""
    if not isinstance(table, pd.DataFrame):
        raise InputError(f"{what}: must be a pandas DataFrame, not {short(table)}")
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(
            f"{what} lack the columns {', '.join(missing)}; they have {', '.join(map(str, table.columns)) or 'none'}"
        )


def words(cell: Cell) -> str:
    """The cell for a message: ``head gcp, optimizer kfac``."""
    return ", ".join(f"{column} {value}" for column, value in cell.items())


def check_cell(name: str, cell: object) -> None:
    """InputError unless the cell maps at least one of CELL_COLUMNS to a word or number; heads must be known."""
    if not isinstance(cell, Mapping) or not cell:
        raise InputError(f"{name} {short(cell)}: must map columns to values, such as {{'head': 'gcp'}}")
    for column, value in cell.items():
        check_known(f"column in {name}", column, CELL_COLUMNS)
        if not isinstance(value, str | Real):
            raise InputError(f"{name}: {column} {short(value)} must be a word or a number")
        if column in ("head", "trained_under"):
            _check_head(column, value)


def check_pair(name: str, cell: object, other_name: str, other: object) -> None:
    """InputError unless both are cells of the same columns, and differ."""
    check_cell(name, cell)
    check_cell(other_name, other)
    assert isinstance(cell, Mapping)
    assert isinstance(other, Mapping)
    if {*cell} != {*other}:
        raise InputError(
            f"{name} and {other_name} must name the same columns, not {', '.join(cell)} and {', '.join(other)}"
        )
    if dict(cell) == dict(other):
        raise InputError(f"{name} and {other_name} are the same cell, {words(cell)}: nothing to compare")


def check_claimed(claimed: object) -> None:
    """InputError unless the claimed side is "below" or "above"."""
    check_known("side claimed", claimed, (BELOW, ABOVE))


def check_margin(margin: object, most: float = float("inf")) -> None:
    """InputError unless the margin is a finite number of at least 0 and below `most`."""
    if isinstance(margin, bool) or not isinstance(margin, Real) or not 0 <= float(margin) < most:
        end = "finite" if most == float("inf") else f"below {most:g}, a share"
        raise InputError(f"margin {short(margin)}: must be a number of at least 0, {end}")


def _check_head(column: str, name: object) -> None:
    if name != "":
        check_known(column.replace("_", " "), name, HEADS)
