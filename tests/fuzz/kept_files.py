"""Result files that were mutilated: tables, their origins, and kept results of runs."""

import gzip
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd

from studies.engine.records import Origins, frame, has_records, read_records, write_records
from studies.engine.store import kept
from studies.engine.study import Results
from studies.judge import judge
from studies.page.writing import usable_tables
from studies.results import read_table, write_table
from studies.study import STUDIES

from .call import Call

REPORTS = Path(__file__).parents[2] / "reports" / "quick"
MACHINE = {"commit": "c", "device": "cpu", "threads": 1, "machine": "m", "versions": {"torch": "2"}}


def write(folder: Path) -> None:
    """One file of each kind."""
    table = pd.DataFrame({"pooling": ["gap", "gcp"], "value": [1.5, 2.5], "seed": [0, 1]})
    write_table(folder, "table", table)
    (folder / "long.csv.gz").write_bytes(gzip.compress(table.to_csv(index=False).encode(), mtime=0))
    origins = Origins("records", {"epochs": 3})
    origins.add("k", 1.0, MACHINE)
    write_records(
        folder, "records", frame("records", [{"quantity": "loss", "value": 1.5}], {"head": "gap"}, "k"), origins
    )
    kept(folder / "runs" / "one" / "result.json", lambda: [{"loss": 1.5}])


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "table": ("table.csv", lambda f: read_table(f, "table", ("pooling", "value"))),
    "long": ("long.csv.gz", lambda f: read_table(f, "long", ("pooling", "value"))),
    "records": ("records.csv", lambda f: read_records(f, "records")),
    "origins": ("records.json", lambda f: read_records(f, "records")),
    "result": ("runs/one/result.json", lambda f: kept(f / "runs" / "one" / "result.json", lambda: [{"loss": 1.5}])),
}
DAMAGE = (
    "cut", "flip", "digit", "empty", "text", "null", "list", "number", "deep", "nan", "folder", "link", "bytes", "missing key",
    "long",     "duplicate", "gone", "fifo", "negative",
)  # fmt: skip


def mutilate(file: Path, damage: str, random: Random) -> None:
    """Damage a file in one way."""
    content = file.read_bytes()
    at = random.randrange(max(1, len(content)))
    whole: dict[str, bytes] = {
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ random.randrange(1, 256)]) + content[at + 1 :],
        "digit": content.replace(random.choice(b"0123456789").to_bytes(1, "big"), b"7"),
        "empty": b"",
        "text": b"no such thing",
        "null": b"null",
        "list": b"[1, 2]",
        "number": b"12",
        "deep": b"[" * 100_000,
        "nan": content.replace(b"1", b"NaN"),
        "bytes": bytes(random.randrange(256) for _ in range(50)),
        "missing key": content.replace(b"value", b"other").replace(b"epochs", b"other").replace(b"seeds", b"other"),
        "long": content * 1000,
        "duplicate": content + content,
        "negative": content.replace(b"1", b"-1"),
    }
    if damage in whole:
        file.write_bytes(whole[damage])
        return
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "link":
        file.symlink_to("nowhere")
    elif damage == "fifo":
        import os

        os.mkfifo(file)


def kept_files(random: Random) -> Call:
    """Any of the kinds below; a whole section takes seconds."""
    return (section if random.random() < 0.02 else reader)(random)


def reader(random: Random) -> Call:
    """A reader of a mutilated file."""
    name, damage = random.choice(list(READERS)), random.choice(DAMAGE)
    state = random.getrandbits(40)
    file, read = READERS[name]

    def run() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            mutilate(Path(folder) / file, damage, Random(state))
            return read(Path(folder))

    return Call(f"{name}: {damage} ({state})", run, pure=True, seconds=8.0)


@lru_cache
def records_of(study: str) -> tuple[pd.DataFrame, Origins]:
    """The records of a study in the repository's report."""
    return read_records(REPORTS, study)


def section(random: Random) -> Call:
    """The folds of a page from records in which something is wrong."""
    there = [name for name in STUDIES if has_records(REPORTS, name)]
    study = random.choice(there)
    kind = random.choice(("cut rows", "nan column", "text cell", "inf cell", "html cell", "negative", "one row"))
    state = random.getrandbits(40)

    def run() -> Any:
        records, origins = records_of(study)
        spoiled = spoil(records, kind, Random(state))
        try:
            with usable_tables(REPORTS / study):  # as in every page
                judged = judge(STUDIES[study].claims, spoiled) if STUDIES[study].claims else []
                return STUDIES[study].folds(Results(spoiled, origins, judged))
        finally:
            plt.close("all")

    return Call(f"folds of {study}: {kind} ({state})", run, pure=True, seconds=100.0)


def spoil(records: pd.DataFrame, kind: str, random: Random) -> pd.DataFrame:
    """A copy in which something is wrong."""
    column, row = random.choice(list(records.columns)), random.randrange(len(records))
    if kind == "cut rows":
        return records.iloc[: random.randrange(len(records))]
    if kind == "one row":
        return records.iloc[row : row + 1]
    table = records.astype({column: object})
    if kind == "nan column":
        table[column] = float("nan")
        return table
    table.loc[row, column] = {"text cell": "x", "inf cell": float("inf"), "html cell": "<script>", "negative": -1}[kind]
    return table
