"""Result tables: tidy CSV files (long ones compressed), each with its provenance in a JSON file of the same name."""

import gzip
import io
import json
import math
import os
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pandas as pd
import torch

from secondorder.atomic import read_regular, write_atomically
from secondorder.errors import InputError
from studies.machine import machine

DIGITS = ".10g"
"""Format of a table's numbers."""
LONG = 200_000
"""Characters of a table above which its file is compressed."""
TABLE_ENDS = (".csv.gz", ".csv")
"""Endings of a table's file, compressed and plain; the first that is there counts."""


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from: enough to run it again."""

    study: str
    config: dict[str, Any]
    seeds: list[int]
    data: dict[str, Any]
    device: str
    threads: int
    """CPU threads of each process, shared by those that it starts itself."""
    seconds: float
    git_commit: str
    versions: dict[str, str]
    machine: str
    processes: int = 1
    """Of one training, by torchrun."""


def provenance(
    study: str,
    config: Mapping[str, Any],
    seeds: list[int],
    data: Mapping[str, Any],
    device: torch.device,
    seconds: float,
    commits: Iterable[str] = (),
) -> Provenance:
    """The provenance of a result computed now, here; `seconds` is the wall-clock time that it took.

    `commits` are those of the code that computed the parts, when not all were computed by the code that runs.
    """
    here = machine(device)
    return Provenance(
        study=study,
        config=dict(config),
        seeds=seeds,
        data=dict(data),
        device=here["device"],
        threads=here["threads"],
        seconds=round(seconds, 2),
        git_commit=" ".join(sorted({*commits} or {here["commit"]})),
        versions=here["versions"],
        machine=here["machine"],
        processes=int(os.environ.get("WORLD_SIZE", 1)),
    )


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file so that it holds either its old content or all of the new one; InputError names it if that fails."""
    try:
        write_atomically(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; what was there before is kept, choose --out with room"
        ) from None


def write_table(
    folder: Path, name: str, table: pd.DataFrame, origin: Provenance | None = None, *, compressed: bool = False
) -> None:
    """``<name>.csv`` with ``<name>.json`` beside it when `origin` is given.

    ``<name>.csv.gz`` instead if `compressed`, and for more than LONG characters; a file of the other kind is removed.
    """
    text = table.to_csv(index=False, float_format=f"%{DIGITS}", lineterminator="\n")
    plain, packed = folder / f"{name}.csv", folder / f"{name}.csv.gz"
    if compressed or len(text) > LONG:
        write_file(packed, gzip.compress(text.encode(), mtime=0))
        plain.unlink(missing_ok=True)
    else:
        write_file(plain, text)
        packed.unlink(missing_ok=True)
    if origin is not None:
        write_file(folder / f"{name}.json", json.dumps(asdict(origin), indent=2, default=str) + "\n")


def remove_table(folder: Path, name: str) -> None:
    """Remove the file of a table, of either kind, if there is one."""
    for end in TABLE_ENDS:
        (folder / f"{name}{end}").unlink(missing_ok=True)


def table_file(folder: Path, name: str) -> Path | None:
    """The file that `write_table` wrote, whatever may be in its place by now; None if there is nothing."""
    return next((path for end in TABLE_ENDS if os.path.lexists(path := folder / f"{name}{end}")), None)


def read_table(folder: Path, name: str, columns: Iterable[str] = (), *, mixed: Collection[str] = ()) -> pd.DataFrame:
    """The table that `write_table` wrote.

    InputError if it is missing, no table, empty or without one of `columns`, and when one of these holds numbers as well as words
    and is not among `mixed`, those that may.
    """
    path = table_file(folder, name) or folder / f"{name}.csv"
    try:
        content = read_regular(path)
        table = pd.read_csv(io.BytesIO(gzip.decompress(content) if path.suffix == ".gz" else content))
    except FileNotFoundError:
        raise InputError(f"no results at {path}; run the study first") from None
    except (ValueError, OSError, EOFError, zlib.error, OverflowError) as error:
        raise InputError(f"{path} is not a readable table ({error}); run the study again") from None
    missing = [column for column in columns if column not in table.columns]
    if missing or table.empty:
        what = f"lacks the columns {', '.join(missing)}" if missing else "is empty"
        raise InputError(f"{path} {what}; run the study again")
    for column in (column for column in columns if column not in mixed):
        _check_cells(path, table[column])
    return table


def _check_cells(path: Path, cells: "pd.Series[Any]") -> None:
    """InputError, with the line in the file, for a word in a column of numbers and a number in one of words."""
    if pd.api.types.is_numeric_dtype(cells.dtype):
        return
    filled = cells[cells.notna()]
    words = pd.to_numeric(filled, errors="coerce").isna()
    odd = filled[~words if 2 * words.sum() > len(words) else words]
    if 0 < len(odd) < len(filled):
        raise InputError(
            f"{path}, line {odd.index[0] + 2}: {cells.name} is {str(odd.iloc[0])[:60]!r}, unlike in the other lines; run the "
            "study again"
        )


def read_provenance(folder: Path, name: str) -> Provenance:
    """The provenance that `write_table` wrote beside a table; InputError unless all of it is there, each of its type."""
    path = folder / f"{name}.json"
    try:
        origin = Provenance(**json.loads(read_regular(path)))
        for field, type_of_field in get_type_hints(Provenance).items():
            _check_type(field, getattr(origin, field), type_of_field)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is no provenance file ({error}); run the study again") from None
    return origin


def _check_type(name: str, value: object, wanted: Any) -> None:
    """TypeError unless the value of a field, and what a list or a dictionary holds, has the type."""
    kind, inner = get_origin(wanted) or wanted, get_args(wanted)
    if kind is Any:
        return
    allowed = (int, float) if kind is float else kind
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.60}, no {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{name} is {value}")
    if isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            _check_type(name, item, inner[-1])
