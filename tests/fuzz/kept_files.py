"""Result files that were mutilated: tables, provenance, settings and kept results of runs."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch

from studies.report import usable_tables
from studies.report.section import Section
from studies.results import provenance, read_provenance, read_table, write_table
from studies.run_folders import commit_of, commits_below, kept, open_runs, sign
from studies.study import STUDIES

from .call import Call

REPORTS = Path(__file__).parents[2] / "reports" / "quick"


@dataclass(frozen=True)
class Settings:
    """Of runs."""

    epochs: int = 3
    poolings: tuple[str, ...] = ("gap", "gcp")


def write(folder: Path) -> None:
    """One file of each kind."""
    table = pd.DataFrame({"pooling": ["gap", "gcp"], "value": [1.5, 2.5], "seed": [0, 1]})
    write_table(folder, "table", table, provenance("x", {"a": 1}, [0], {"label": "x"}, torch.device("cpu"), 1.0))
    write_table(folder, "long", table, compressed=True)
    open_runs(folder / "runs", Settings(), resume=False)
    sign(folder / "runs" / "one")
    kept(folder / "runs" / "one" / "result.json", lambda: [{"loss": 1.5}])


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "table": ("table.csv", lambda f: read_table(f, "table", ("pooling", "value"))),
    "long": ("long.csv.gz", lambda f: read_table(f, "long", ("pooling", "value"))),
    "provenance": ("table.json", lambda f: read_provenance(f, "table")),
    "settings": ("runs/settings.json", lambda f: open_runs(f / "runs", Settings(), resume=True)),
    "commit": ("runs/one/commit", lambda f: commit_of(f / "runs" / "one")),
    "commits": ("runs/one/commit", lambda f: commits_below(f / "runs")),
    "sign": ("runs/one/commit", lambda f: sign(f / "runs" / "one")),
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
def tables(study: str) -> list[Path]:
    """The result files of a study in the repository's report."""
    files = (
        sorted(REPORTS.glob(f"{study}*.csv")) + sorted(REPORTS.glob(f"{study}*.csv.gz")) + [REPORTS / f"{study}.json"]
    )
    return [file for file in files if "summary" not in file.name and "ratios" not in file.name]


def section(random: Random) -> Call:
    """The section of a report from tables in which something is wrong."""
    study = random.choice(("landscape", "performance", "performance", random.choice(list(STUDIES))))
    damaged = random.choice(tables(study))
    kind = random.choice(
        ("cut rows", "drop column", "nan column", "text cell", "inf cell", "html cell", "negative", "one row", "json")
    )
    state = random.getrandbits(40)

    def run() -> Section:
        with tempfile.TemporaryDirectory() as name:
            for file in tables(study):
                shutil.copy(file, name)
            spoil(Path(name) / damaged.name, kind, Random(state))
            try:
                with usable_tables(Path(name) / study):  # as in every report
                    return STUDIES[study].section(Path(name))
            finally:
                plt.close("all")

    return Call(f"section {study}, {damaged.name}: {kind} ({state})", run, pure=True, seconds=100.0)


def spoil(file: Path, kind: str, random: Random) -> None:
    """Change a table, or a value of a provenance file."""
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        key = random.choice(list(content))
        content[key] = random.choice((None, "x", [], {}, -1, "<script>", {"a": "<b>"}))
        file.write_text(json.dumps(content))
        return
    table = pd.read_csv(file)
    column, row = random.choice(list(table.columns)), random.randrange(len(table))
    if kind == "cut rows":
        table = table.iloc[: random.randrange(len(table))]
    elif kind == "one row":
        table = table.iloc[row : row + 1]
    elif kind == "drop column":
        table = table.drop(columns=column)
    elif kind == "nan column":
        table[column] = float("nan")
    else:
        cell = {"text cell": "x", "inf cell": float("inf"), "html cell": "<script>", "negative": -1, "json": None}[kind]
        table = table.astype({column: object})
        table.loc[row, column] = cell
    table.to_csv(file, index=False)
