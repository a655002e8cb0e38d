"""Files of results: tables as CSV, long ones compressed, and sealed JSON files, which are refused when anything in them changed.

A sealed file is one JSON object, ``{"sha256": ..., "content": ...}``. The digest is of the content, number for number in the
order it has there, and of the file's name with that of its folder: the file of another run does not pass for this one's.
"""

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from secondorder.atomic import read_regular, write_atomically
from secondorder.errors import InputError

DIGITS = ".10g"
"""Format of a table's numbers."""
RECOMPUTE = "delete it, and the same command computes it again"
"""What to do with a sealed file that cannot be used."""
LONG = 200_000
"""Characters of a table above which its file is compressed."""
TABLE_ENDS = (".csv.gz", ".csv")
"""Endings of a table's file, compressed and plain; the first that is there counts."""


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file so that it holds either its old content or all of the new one; InputError names it if that fails."""
    try:
        write_atomically(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; what was there before is kept, choose --out with room"
        ) from None


def write_table(folder: Path, name: str, table: pd.DataFrame) -> None:
    """``<name>.csv``, or ``<name>.csv.gz`` for more than LONG characters; a file of the other kind is removed."""
    text = table.to_csv(index=False, float_format=f"%{DIGITS}", lineterminator="\n")
    plain, packed = folder / f"{name}.csv", folder / f"{name}.csv.gz"
    if len(text) > LONG:
        write_file(packed, gzip.compress(text.encode(), mtime=0))
        plain.unlink(missing_ok=True)
    else:
        write_file(plain, text)
        packed.unlink(missing_ok=True)


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


def write_sealed(file: Path, content: Any) -> None:
    """Write content that JSON can hold, with its digest; InputError that names the file when it cannot be written."""
    text = json.dumps(content)
    write_file(file, f'{{"sha256": "{_digest(file, text)}", "content": {text}}}\n')


def read_sealed(file: Path, way_out: str = RECOMPUTE) -> Any:
    """The content of a file that `write_sealed` wrote.

    InputError, which names the file and ends with `way_out`, when it is missing, unreadable or no file, when it is not JSON or
    has no digest (it was written before there were digests), and when digest and content do not belong together.
    """
    try:
        sealed = json.loads(read_regular(file).decode())
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror or error}; {way_out}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}); {way_out}") from None
    if not isinstance(sealed, dict) or sealed.keys() != {"sha256", "content"}:
        raise InputError(f"{file} has no digest: it is damaged, or an earlier version wrote it; {way_out}")
    if sealed["sha256"] != _digest(file, json.dumps(sealed["content"])):
        raise InputError(f"{file} is damaged: it is not what was written there; {way_out}")
    return sealed["content"]


def _digest(file: Path, text: str) -> str:
    return hashlib.sha256(f"{file.absolute().parent.name}/{file.name}\n{text}".encode()).hexdigest()
