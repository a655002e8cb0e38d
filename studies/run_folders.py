"""The folder of a study's training runs: begun afresh or resumed, and by which code each run was begun."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

from secondorder.errors import InputError
from studies.results import git_commit
from studies.sealed import read_sealed, write_sealed

Content = TypeVar("Content")
SETTINGS_LOST = "delete it and continue with --resume and the flags of the interrupted command"


def open_runs(folder: Path, settings: Any, resume: bool, may_grow: Collection[str] = ("poolings",)) -> None:
    """Start the folder of runs afresh, or check that the runs there are of these settings.

    The settings named in `may_grow` may differ: each of their values has runs of its own, so that others can be added.
    InputError for other settings, and for a folder that cannot be emptied, made or read.
    """
    file, mine = folder / "settings.json", json.loads(json.dumps(asdict(settings)))
    if resume and _is_there(file):
        theirs = read_sealed(file, SETTINGS_LOST)
        for name in (n for n in mine if n not in may_grow and mine[n] != theirs.get(n)):
            raise InputError(
                f"the runs in {folder} have {name} = {theirs.get(name)!r}, not {mine[name]!r}; repeat the flags of the "
                "interrupted command, or start afresh without --resume"
            )
    elif not resume:
        _empty(folder)
    _make(folder)
    write_sealed(file, mine)


def sign(folder: Path) -> None:
    """Note the commit of the code that begins a run, which may not be the code that finishes the study.

    InputError when there is a note that cannot be read: before the run, not after all of them.
    """
    kept(folder / "commit", git_commit)


def commit_of(folder: Path) -> str:
    """The commit that `sign` noted."""
    return cast(str, read_sealed(folder / "commit"))


def commits_below(folder: Path) -> list[str]:
    """Those that `sign` noted in the folders directly below."""
    return sorted({commit_of(file.parent) for file in folder.glob("*/commit")})


def kept(file: Path, compute: Callable[[], Content]) -> Content:
    """What is in a file as JSON, which is computed and written when it does not exist; InputError when it is damaged."""
    if not _is_there(file):
        _make(file.parent)
        write_sealed(file, compute())
    return cast(Content, read_sealed(file))


def _is_there(file: Path) -> bool:
    """Whether anything has this name, be it a link to nowhere; what it is shows when it is read."""
    return os.path.lexists(file)


def _make(folder: Path) -> None:
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _empty(folder: Path) -> None:
    """Delete what is in a folder; what stayed would be taken for a result of the new settings, so that failing is an error."""
    with _named(folder):
        if folder.is_dir():
            for entry in folder.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        elif _is_there(folder):
            folder.unlink()


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """OSError becomes InputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot use the folder of runs {folder}: {error.filename or folder}: {reason}; make it writable or choose "
            "another --out"
        ) from None
