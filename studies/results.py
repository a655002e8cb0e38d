"""Result tables: tidy CSV files (long ones compressed), each with its provenance in a JSON file of the same name."""

import gzip
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pandas as pd
import torch

from secondorder.atomic import read_regular, write_atomically
from secondorder.errors import InputError

PACKAGES = ("secondorder", "torch", "torchvision", "numpy", "scipy", "pandas", "scikit-learn", "pillow")

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
    return Provenance(
        study=study,
        config=dict(config),
        seeds=seeds,
        data=dict(data),
        device=device_name(device),
        threads=torch.get_num_threads(),
        seconds=round(seconds, 2),
        git_commit=" ".join(sorted({*commits} or {git_commit()})),
        versions=versions(),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        processes=int(os.environ.get("WORLD_SIZE", 1)),
    )


@lru_cache(maxsize=1)  # of every measurement, and reading them takes longer than many of these
def versions() -> dict[str, str]:
    """Of Python and of the libraries that compute."""
    installed = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return installed | {"torch": torch.__version__}  # which names the build too, e.g. +cu132


def device_name(device: torch.device) -> str:
    """The processor's own name, e.g. ``cpu: AMD EPYC`` or ``cuda: NVIDIA H100``."""
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", None)
        return f"{device.type}: {name(device) if name is not None else platform.processor() or platform.machine()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"cpu: {model}"


@lru_cache(maxsize=1)
def git_commit() -> str:
    """The commit of the code that runs, ``+changes`` if files differ from it, ``unknown`` outside a git checkout.

    Read once, at the start of a command: a commit made meanwhile is not the code that computes.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "secondorder", "studies", "pyproject.toml")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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
    text = table.to_csv(index=False, float_format="%.10g", lineterminator="\n")
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
