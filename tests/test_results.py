"""Tables on disk, and what computes here."""

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch

from secondorder.errors import InputError
from studies.engine.records import read_records
from studies.machine import git_commit, machine
from studies.results import (
    LONG,
    read_table,
    table_file,
    write_file,
    write_table,
)
from studies.settings import own_folder


@contextmanager
def tiny_disk() -> Iterator[None]:
    """No file may grow beyond 1,000 bytes: a write past that fails as on a full disk.

    Held only around the writing itself: pytest's own output may be such a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_table_comes_back(tmp_path: Path) -> None:
    table = pd.DataFrame({"seed": [0, 1], "loss": [0.1, 1 / 3], "pooling": ["gap", "gcp"]})
    write_table(tmp_path, "landscape", table)
    pd.testing.assert_frame_equal(read_table(tmp_path, "landscape"), table, rtol=1e-7)


def test_what_computes_here_is_told() -> None:
    here = machine(torch.device("cpu"))
    assert here["commit"] == git_commit()
    assert here["versions"]["torch"] == torch.__version__
    assert here["device"].startswith("cpu: ")


def test_long_tables_are_compressed_and_only_the_last_is_kept(tmp_path: Path) -> None:
    for rows in (10, LONG // 8, 5):
        table = pd.DataFrame({"value": range(10**7, 10**7 + rows)})  # 9 characters a row
        write_table(tmp_path, "a", table)
        file = tmp_path / ("a.csv.gz" if rows * 9 > LONG else "a.csv")
        assert list(tmp_path.iterdir()) == [file] == [table_file(tmp_path, "a")]
        pd.testing.assert_frame_equal(read_table(tmp_path, "a"), table)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    write_file(tmp_path / "a.csv", "old")
    with tiny_disk(), pytest.raises(InputError, match=r"a\.csv: File too large; what was there before is kept"):
        write_file(tmp_path / "a.csv", "x" * 5000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
    assert (tmp_path / "a.csv").read_text() == "old"
    message = f"cannot write to the output folder {tmp_path}: File too large"
    with tiny_disk(), pytest.raises(InputError, match=message):
        own_folder(tmp_path).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to the output folder .*file/out: Not a directory"):
        own_folder(tmp_path / "file" / "out").__enter__()


@pytest.mark.parametrize("content", [None, "", "{"])
def test_missing_or_broken_files_are_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        for suffix in ("csv", "json"):
            (tmp_path / f"landscape.{suffix}").write_text(content)
    if content != "{":
        with pytest.raises(InputError, match=r"landscape\.csv"):
            read_table(tmp_path, "landscape")
    with pytest.raises(InputError, match=r"landscape\.(csv|json)"):
        read_records(tmp_path, "landscape")


CELLS: dict[str, tuple[list[object], str | None]] = {
    "a word among numbers": ([0.5, "x", 1.5], "line 3: value is 'x'"),
    "markup among numbers": (["<b>", 2, 3], "line 2: value is '<b>'"),
    "a number among words": (["gap", "gcp", -1], "line 4: value is '-1'"),
    "an infinite number among words": (["gap", "gcp", "inf"], "line 4: value is 'inf'"),
    "numbers that are none": ([0.5, float("nan"), float("inf")], None),
    "words and nothing": (["gap", None, "gcp"], None),
    "nothing": ([None, None, None], None),
    "truth": ([True, False, True], None),
}


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_unlike_the_others_is_named_with_its_line(tmp_path: Path, kind: str) -> None:
    cells, words = CELLS[kind]
    write_table(tmp_path, "a", pd.DataFrame({"value": cells, "other": [1, 2, "x"]}))
    if words is None:
        assert len(read_table(tmp_path, "a", ["value"])) == 3
        return
    with pytest.raises(InputError, match=rf"a\.csv, {words}"):
        read_table(tmp_path, "a", ["value"])
    assert len(read_table(tmp_path, "a", ["value"], mixed=["value"])) == 3


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with own_folder(tmp_path):
        other = subprocess.run(
            [sys.executable, "-c", f"from pathlib import Path; from secondorder.atomic import exclusive\n"
             f"with exclusive(Path({str(tmp_path)!r})): pass"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert "InputError: another process writes to" in other.stderr
    with own_folder(tmp_path):  # given back
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
